/* socket: TCP between the ranks of a world: addresses, connections that time out, and transfers that never raise a signal. */
#include "nccl/nccl.h"
#include "nccl/nccl_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#ifdef MSG_NOSIGNAL
#define LLMPAR__NCCL_SEND_FLAGS MSG_NOSIGNAL
#else
#define LLMPAR__NCCL_SEND_FLAGS 0 /* macOS: SO_NOSIGPIPE */
#endif

LLMPAR__PRIVATE_DEF double llmpar__nccl_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

LLMPAR__PRIVATE_DEF void llmpar__nccl_nap(double seconds)
{
    struct timespec t;
    t.tv_sec = (time_t)seconds;
    t.tv_nsec = (long)((seconds - (double)t.tv_sec) * 1e9);
    nanosleep(&t, NULL);
}

LLMPAR__PRIVATE_DEF void llmpar__nccl_close(int *fd)
{
    if (*fd >= 0) close(*fd);
    *fd = -1;
}

LLMPAR__PRIVATE_DEF uint64_t llmpar__nccl_random(void)
{
    uint64_t bits = 0;
    int fd = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
    ssize_t got = fd >= 0 ? read(fd, &bits, sizeof bits) : 0;
    if (fd >= 0) close(fd);
    if (got != (ssize_t)sizeof bits) bits = (uint64_t)(llmpar__nccl_now() * 1e9) ^ (uint64_t)getpid() << 40; /* it only has to tell jobs apart */
    return bits ? bits : 1;
}

static int llmpar__nccl_prepare(int fd)
{
    int one = 1, flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) || fcntl(fd, F_SETFD, FD_CLOEXEC)) return 0;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one);
#ifdef SO_NOSIGPIPE
    setsockopt(fd, SOL_SOCKET, SO_NOSIGPIPE, &one, sizeof one);
#endif
    return 1;
}

LLMPAR__PRIVATE_DEF int llmpar__nccl_readable(int fd, double seconds)
{
    struct pollfd p;
    p.fd = fd;
    p.events = POLLIN;
    p.revents = 0;
    return poll(&p, 1, seconds > 0 ? (int)(seconds * 1000) + 1 : 0) > 0;
}

LLMPAR__PRIVATE_DEF int llmpar__nccl_gone(int fd)
{
    char byte;
    if (!llmpar__nccl_readable(fd, 0)) return 0;
    ssize_t got = recv(fd, &byte, 1, MSG_PEEK);
    return got == 0 || (got < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR);
}

static int llmpar__nccl_bind(int family, int port, int loopback, int *bound, int *failure)
{
    struct sockaddr_storage address;
    socklen_t length;
    int one = 1, zero = 0, fd = socket(family, SOCK_STREAM, 0);
    memset(&address, 0, sizeof address);
    if (fd < 0) {
        *failure = errno;
        return -1;
    }
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (family == AF_INET6) {
        struct sockaddr_in6 *six = (struct sockaddr_in6 *)(void *)&address;
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &zero, sizeof zero); /* IPv4 comes in here too */
        six->sin6_family = AF_INET6;
        six->sin6_port = htons((uint16_t)port);
        six->sin6_addr = loopback ? in6addr_loopback : in6addr_any;
        length = sizeof *six;
    } else {
        struct sockaddr_in *four = (struct sockaddr_in *)(void *)&address;
        four->sin_family = AF_INET;
        four->sin_port = htons((uint16_t)port);
        four->sin_addr.s_addr = htonl(loopback ? INADDR_LOOPBACK : INADDR_ANY);
        length = sizeof *four;
    }
    if (bind(fd, (struct sockaddr *)(void *)&address, length) || listen(fd, 4096) || getsockname(fd, (struct sockaddr *)(void *)&address, &length) || !llmpar__nccl_prepare(fd)) {
        *failure = errno;
        close(fd);
        return -1;
    }
    *bound = (int)ntohs(family == AF_INET6 ? ((struct sockaddr_in6 *)(void *)&address)->sin6_port : ((struct sockaddr_in *)(void *)&address)->sin_port);
    return fd;
}

/* A name of this machine alone is listened on alone; any other may be one of several, or of a router in front of it. */
LLMPAR__PRIVATE_DEF int llmpar__nccl_listen(const char *host, int port, int *bound, int *failure)
{
    int loopback4 = host && (!strcmp(host, "127.0.0.1") || !strcmp(host, "localhost")), loopback6 = host && !strcmp(host, "::1"), fd = -1;
    if (!loopback4) fd = llmpar__nccl_bind(AF_INET6, port, loopback6, bound, failure);
    if (fd >= 0 || loopback6 || (!loopback4 && *failure == EADDRINUSE)) return fd;
    return llmpar__nccl_bind(AF_INET, port, loopback4, bound, failure);
}

LLMPAR__PRIVATE_DEF int llmpar__nccl_connect(const char *host, int port, double limit, const char **why)
{
    struct addrinfo hints, *all = NULL;
    char service[16];
    int fd = -1;
    memset(&hints, 0, sizeof hints);
    hints.ai_family = AF_UNSPEC;
    hints.ai_socktype = SOCK_STREAM;
    snprintf(service, sizeof service, "%d", port);
    int unknown = getaddrinfo(host, service, &hints, &all);
    if (unknown) {
        *why = gai_strerror(unknown);
        return -1;
    }
    for (struct addrinfo *a = all; a && fd < 0; a = a->ai_next) {
        double until = llmpar__nccl_now() + 2;
        if (until > limit) until = limit;
        fd = socket(a->ai_family, SOCK_STREAM, 0);
        int connected = fd >= 0 && llmpar__nccl_prepare(fd) && (!connect(fd, a->ai_addr, a->ai_addrlen) || errno == EINPROGRESS), broken = errno;
        if (connected) {
            struct pollfd p;
            socklen_t length = sizeof broken;
            p.fd = fd;
            p.events = POLLOUT;
            p.revents = 0;
            double left = until - llmpar__nccl_now();
            broken = ETIMEDOUT;
            connected = poll(&p, 1, left > 0 ? (int)(left * 1000) : 0) > 0 && !getsockopt(fd, SOL_SOCKET, SO_ERROR, &broken, &length) && !broken;
        }
        if (!connected) {
            *why = strerror(broken);
            llmpar__nccl_close(&fd);
        }
    }
    freeaddrinfo(all);
    return fd;
}

LLMPAR__PRIVATE_DEF int llmpar__nccl_accept_one(int listener)
{
    int fd = accept(listener, NULL, NULL);
    if (fd >= 0 && !llmpar__nccl_prepare(fd)) llmpar__nccl_close(&fd);
    return fd;
}

LLMPAR__PRIVATE_DEF int llmpar__nccl_send_all(int fd, const void *bytes, size_t count, double limit)
{
    const char *at = (const char *)bytes;
    while (count) {
        ssize_t sent = send(fd, at, count, LLMPAR__NCCL_SEND_FLAGS);
        if (sent > 0) {
            at += sent;
            count -= (size_t)sent;
            continue;
        }
        if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) return 0;
        if (llmpar__nccl_now() >= limit) return 0;
        llmpar__nccl_nap(0.001);
    }
    return 1;
}

LLMPAR__PRIVATE_DEF long llmpar__nccl_receive_some(int fd, void *bytes, size_t count)
{
    ssize_t got = recv(fd, bytes, count, 0);
    if (got > 0) return (long)got;
    return got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR) ? 0 : -1;
}

LLMPAR__PRIVATE_DEF int llmpar__nccl_receive_all(int fd, void *bytes, size_t count, double limit)
{
    char *at = (char *)bytes;
    while (count) {
        ssize_t got = recv(fd, at, count, 0);
        if (got > 0) {
            at += got;
            count -= (size_t)got;
            continue;
        }
        if (got == 0 || (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR)) return 0;
        double left = limit - llmpar__nccl_now();
        if (left <= 0) return -1;
        llmpar__nccl_readable(fd, left < 0.1 ? left : 0.1);
    }
    return 1;
}

LLMPAR__PRIVATE_DEF int llmpar__nccl_split_address(const char *address, char host[256], int *port)
{
    const char *colon = strrchr(address, ':'), *begin = address, *end = colon;
    char *rest;
    if (!colon || colon == address) return 0;
    if (*begin == '[') { /* an IPv6 address has colons of its own */
        if (colon[-1] != ']') return 0;
        begin++;
        end--;
    }
    if (end <= begin || end - begin > 255) return 0;
    memcpy(host, begin, (size_t)(end - begin));
    host[end - begin] = 0;
    long number = strtol(colon + 1, &rest, 10);
    if (colon[1] < '0' || colon[1] > '9' || *rest || number > 65535) return 0;
    *port = (int)number;
    return 1;
}

LLMPAR__PRIVATE_DEF void llmpar__nccl_own_host(char *host, size_t capacity)
{
    if (gethostname(host, capacity)) snprintf(host, capacity, "?");
    host[capacity - 1] = 0;
}

LLMPAR__PRIVATE_DEF void llmpar__nccl_own_boot(char *boot, size_t capacity)
{
    int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
    ssize_t got = fd >= 0 ? read(fd, boot, capacity - 1) : 0;
    if (fd >= 0) close(fd);
    boot[got > 0 ? got : 0] = 0;
    boot[strcspn(boot, "\n")] = 0;
}

LLMPAR__PRIVATE_DEF size_t llmpar__nccl_own_addresses(char *text, size_t capacity)
{
    struct ifaddrs *all = NULL;
    size_t used = 0;
    text[0] = 0;
    if (getifaddrs(&all)) all = NULL;
    for (int loopback = 0; loopback < 2; loopback++)
        for (struct ifaddrs *i = all; i; i = i->ifa_next) {
            char name[256];
            if (!i->ifa_addr || !(i->ifa_flags & IFF_UP) || ((i->ifa_flags & IFF_LOOPBACK) != 0) != loopback) continue;
            int family = i->ifa_addr->sa_family;
            if (family != AF_INET && family != AF_INET6) continue;
            if (getnameinfo(i->ifa_addr, (socklen_t)(family == AF_INET ? sizeof(struct sockaddr_in) : sizeof(struct sockaddr_in6)), name, sizeof name, NULL, 0, NI_NUMERICHOST)) continue;
            if (strchr(name, '%')) continue; /* a link's own address says nothing on another machine */
            size_t length = strlen(name);
            if (used + length + 2 > capacity) break;
            if (used) text[used++] = ' ';
            memcpy(text + used, name, length + 1);
            used += length;
        }
    if (all) freeifaddrs(all);
    if (!used) used = (size_t)snprintf(text, capacity, "127.0.0.1");
    return used;
}

/* ---- messages ---- */

LLMPAR__PRIVATE_DEF int llmpar__nccl_link_make(llmpar_heap *heap, llmpar__nccl_link *link, size_t in, size_t out)
{
    link->fd = -1;
    link->in = (unsigned char *)llmpar_heap_alloc(heap, in, 1);
    link->out = (unsigned char *)llmpar_heap_alloc(heap, out, 1);
    link->in_room = in;
    link->out_room = out;
    return link->in && link->out;
}

LLMPAR__PRIVATE_DEF int llmpar__nccl_link_put(llmpar__nccl_link *link, llmpar__nccl_kind kind, const void *a, size_t a_bytes, const void *b, size_t b_bytes)
{
    llmpar__nccl_head head;
    if (link->fd < 0 || link->out_room - link->out_used < sizeof head + a_bytes + b_bytes) return 0;
    head.word = LLMPAR__NCCL_WORD;
    head.kind = (uint32_t)kind;
    head.bytes = a_bytes + b_bytes;
    unsigned char *at = link->out + link->out_used;
    memcpy(at, &head, sizeof head);
    if (a_bytes) memcpy(at + sizeof head, a, a_bytes);
    if (b_bytes) memcpy(at + sizeof head + a_bytes, b, b_bytes);
    link->out_used += sizeof head + a_bytes + b_bytes;
    return 1;
}

LLMPAR__PRIVATE_DEF int llmpar__nccl_link_flush(llmpar__nccl_link *link)
{
    size_t done = 0;
    while (link->fd >= 0 && done < link->out_used) {
        ssize_t sent = send(link->fd, link->out + done, link->out_used - done, LLMPAR__NCCL_SEND_FLAGS);
        if (sent > 0) {
            done += (size_t)sent;
            continue;
        }
        if (errno == EINTR) continue;
        if (errno != EAGAIN && errno != EWOULDBLOCK) return 0;
        break;
    }
    link->out_used -= done;
    if (done && link->out_used) memmove(link->out, link->out + done, link->out_used);
    return 1;
}

LLMPAR__PRIVATE_DEF int llmpar__nccl_link_fill(llmpar__nccl_link *link)
{
    while (link->fd >= 0 && link->in_used < link->in_room) {
        size_t room = link->in_room - link->in_used;
        ssize_t got = recv(link->fd, link->in + link->in_used, room, 0);
        if (got > 0) {
            link->in_used += (size_t)got;
            if ((size_t)got < room) break; /* it is empty for now; its end would be the next wait's to find */
            continue;
        }
        if (got < 0 && errno == EINTR) continue;
        return got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK);
    }
    return 1;
}

LLMPAR__PRIVATE_DEF void llmpar__nccl_wait_links(llmpar__nccl_world *world, double seconds)
{
    struct pollfd *p = world->polled;
    int32_t count = 1, peers = world->rank ? 1 : world->ranks;
    p[0].fd = world->pipe[0];
    p[0].events = POLLIN;
    pthread_mutex_lock(&world->lock);
    for (int32_t i = 0; i < peers; i++) {
        const llmpar__nccl_link *link = &world->peer[i].link;
        if (link->fd < 0) continue;
        world->polled_peer[count] = i;
        p[count].fd = link->fd;
        p[count++].events = (short)((link->in_used < link->in_room ? POLLIN : 0) | (link->out_used ? POLLOUT : 0));
    }
    pthread_mutex_unlock(&world->lock);
    if (poll(p, (nfds_t)count, (int)(seconds * 1000) + 1) <= 0) return;
    if (p[0].revents) {
        char drop[64];
        while (read(world->pipe[0], drop, sizeof drop) > 0) {}
    }
    pthread_mutex_lock(&world->lock);
    for (int32_t i = 1; i < count; i++) world->peer[world->polled_peer[i]].link.ready = (p[i].revents & ~POLLOUT) != 0;
    pthread_mutex_unlock(&world->lock);
}

LLMPAR__PRIVATE_DEF void llmpar__nccl_poke(const llmpar__nccl_world *world)
{
    char one = 1;
    ssize_t ignored = write(world->pipe[1], &one, 1); /* full: it is awake anyway */
    (void)ignored;
}

LLMPAR__PRIVATE_DEF int llmpar__nccl_pipe(int fds[2])
{
    if (pipe(fds)) {
        fds[0] = fds[1] = -1;
        return 0;
    }
    for (int i = 0; i < 2; i++)
        if (fcntl(fds[i], F_SETFL, O_NONBLOCK) || fcntl(fds[i], F_SETFD, FD_CLOEXEC)) return 0;
    return 1;
}

#undef LLMPAR__NCCL_SEND_FLAGS
