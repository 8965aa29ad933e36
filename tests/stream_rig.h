/* stream_rig: what the tests of threaded streams share: a device with such streams, and gates, at which each side waits until it has seen the other.
   What has to run at the same time is proved by such a rendezvous, never by a clock. */
#ifndef STREAM_RIG_H
#define STREAM_RIG_H

#include "test.h"

#include <pthread.h>
#include <time.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { GRAPHS = 400, ROUNDS = 20 };
#else
enum { GRAPHS = 4000, ROUNDS = 60 };
#endif
enum { PATIENCE = 120 }; /* seconds until something that never comes is a failure */

/* ---- a device with threaded streams ---- */

enum { STREAMS = 4 };
typedef struct rig {
    llmpar_heap heap;
    llmpar_error error;
    llmpar_device *device;
    llmpar_stream *stream[STREAMS];
} rig;

static inline void rig_begin(rig *r, int32_t workers, int streams, int threads)
{
    static const char *const name[STREAMS] = {"compute", "gather", "reduce", "offload"};
    llmpar_cpu_desc desc;
    memset(r, 0, sizeof *r);
    memset(&desc, 0, sizeof desc);
    llmpar_heap_init(&r->heap, NULL);
    llmpar_error_clear(&r->error);
    desc.threads = workers;
    CHECK_OK(llmpar_cpu_create(&r->heap, &r->error, &desc, &r->device));
    for (int i = 0; i < streams; i++) {
        CHECK_OK(r->device->stream_create(r->device, name[i], &r->stream[i]));
        if (threads) CHECK_OK(llmpar_device_stream_thread(r->device, r->stream[i]));
    }
}

static inline void rig_end(rig *r)
{
    for (int i = 0; i < STREAMS; i++)
        if (r->stream[i]) r->device->stream_destroy(r->device, r->stream[i]);
    llmpar_cpu_destroy(r->device);
    CHECK_INT(r->heap.live, 0);
}

/* ---- a number that threads wait for ---- */

typedef struct gate { pthread_mutex_t lock; pthread_cond_t moved; int value; } gate;
static inline void gate_init(gate *g) { pthread_mutex_init(&g->lock, NULL); pthread_cond_init(&g->moved, NULL); g->value = 0; }
static inline void gate_destroy(gate *g) { pthread_mutex_destroy(&g->lock); pthread_cond_destroy(&g->moved); }
static inline void gate_add(gate *g) { pthread_mutex_lock(&g->lock); g->value++; pthread_cond_broadcast(&g->moved); pthread_mutex_unlock(&g->lock); }
static inline int gate_get(gate *g) { pthread_mutex_lock(&g->lock); int v = g->value; pthread_mutex_unlock(&g->lock); return v; }
static inline llmpar_status gate_wait(gate *g, int value)
{
    struct timespec until;
    int late = 0;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += PATIENCE;
    pthread_mutex_lock(&g->lock);
    while (g->value < value && !late) late = pthread_cond_timedwait(&g->moved, &g->lock, &until);
    late = g->value < value;
    pthread_mutex_unlock(&g->lock);
    return late ? LLMPAR_ERR_TIMEOUT : LLMPAR_OK;
}

typedef struct gate_call { gate *add, *wait; int value; } gate_call;
static inline llmpar_status run_gate(void *arg)
{
    gate_call *c = (gate_call *)arg;
    if (c->add) gate_add(c->add);
    return c->wait ? gate_wait(c->wait, c->value) : LLMPAR_OK;
}
static inline llmpar_status put_gate(llmpar_device *device, llmpar_stream *stream, gate *add, gate *wait, int value)
{
    gate_call c = {add, wait, value};
    return device->host_call(device, stream, run_gate, &c, sizeof c);
}

#endif
