/* ports: TCP ports of the loopback, for tests of who meets there. */
#ifndef PORTS_H
#define PORTS_H

#include <arpa/inet.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static inline int port_bind(int port, int *fd, int reuse)
{
    struct sockaddr_in a;
    socklen_t length = sizeof a;
    *fd = socket(AF_INET, SOCK_STREAM, 0);
    memset(&a, 0, sizeof a);
    a.sin_family = AF_INET;
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    a.sin_port = htons((uint16_t)port);
    if (setsockopt(*fd, SOL_SOCKET, SO_REUSEADDR, &reuse, sizeof reuse) || bind(*fd, (struct sockaddr *)&a, sizeof a) || getsockname(*fd, (struct sockaddr *)&a, &length)) return 0;
    return ntohs(a.sin_port);
}
/* *fd: a socket that listens on the port, or, for 0, on any. Returns its port; 0: it does not listen. */
static inline int port_listen(int port, int *fd)
{
    port = port_bind(port, fd, 0);
    return port && listen(*fd, 64) ? 0 : port;
}
/* One that nobody has. It stays bound until the process ends, so that no other program is given it; with SO_REUSEADDR, and not listened on, it is there for whom it is meant. */
static inline int port_free(void)
{
    int fd;
    return port_bind(0, &fd, 1);
}

#endif
