/* ports: TCP ports of the loopback, for tests of who meets there. */
#ifndef PORTS_H
#define PORTS_H

#include <arpa/inet.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* *fd: a socket that listens on the port, or, for 0, on any. Returns its port; 0: it does not listen. */
static inline int port_listen(int port, int *fd)
{
    struct sockaddr_in a;
    socklen_t length = sizeof a;
    *fd = socket(AF_INET, SOCK_STREAM, 0);
    memset(&a, 0, sizeof a);
    a.sin_family = AF_INET;
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    a.sin_port = htons((uint16_t)port);
    if (bind(*fd, (struct sockaddr *)&a, sizeof a) || listen(*fd, 64) || getsockname(*fd, (struct sockaddr *)&a, &length)) return 0;
    return ntohs(a.sin_port);
}
/* One that was free a moment ago. */
static inline int port_free(void)
{
    int fd, port = port_listen(0, &fd);
    close(fd);
    return port;
}

#endif
