// mock: an upstream that speaks just enough of Anthropic's Messages API to measure a proxy.
//
//     cc -O2 -o mock mock.c && ./mock [PORT]        (Linux; listens on 127.0.0.1, default port 9900)
//
// One thread, one epoll loop, answers written from prepared buffers: 5 to 9 microseconds a request, so
// that the proxy in front of it is always the slower half. The "model" of the request picks the answer:
//
//     ...burst...        200 tokens, all at once
//     ...one...          one token
//     ...json...         a short sentence: one JSON body, or the same text as a stream
//     ...paced-NxM...    M tokens (200 if "xM" is left out), one every N x 10 ms, each in a write of its own
//
// "stream": true in the body asks for server-sent events, anything else for one JSON body.
// GET /stats answers with counters; "aborted" are the answers whose reader left early.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define MAX_CONNECTIONS 20000
#define MAX_REQUEST (1 << 20)
#define BURST_TOKENS 200
#define TOKENS_PER_CHUNK 50
#define TICK_NANOSECONDS 1000000L  // how often the paced streams are looked at

typedef struct connection {
    int fd;
    char *in;  // request bytes that are not answered yet
    size_t in_length, in_capacity;
    char *out;  // answer bytes the socket would not take yet
    size_t out_length, out_offset;
    int tokens_sent, tokens_total;  // of the paced stream; tokens_total is 0 when there is none
    double period, due;             // seconds between tokens; when the next one goes out
    struct connection *previous, *next;  // the list of paced streams
} Connection;

static Connection *connections[MAX_CONNECTIONS];  // by file descriptor
static Connection *paced;                         // head of the list of paced streams
static int epoll;
static long open_connections, requests, finished, aborted, token_writes;

// ---- What is sent ----

static const char HEAD[] =
    "HTTP/1.1 200 OK\r\n"
    "Content-Type: text/event-stream; charset=utf-8\r\n"
    "Cache-Control: no-cache\r\n"
    "request-id: req_011mock00000000000000000\r\n"
    "Transfer-Encoding: chunked\r\n"
    "Connection: keep-alive\r\n\r\n";
static const char START[] =
    "event: message_start\n"
    "data: {\"type\":\"message_start\",\"message\":{\"id\":\"msg_01mock00000000000000000\","
    "\"type\":\"message\",\"role\":\"assistant\",\"content\":[],\"model\":\"claude-mock\","
    "\"stop_reason\":null,\"stop_sequence\":null,\"usage\":{\"input_tokens\":11,"
    "\"cache_creation_input_tokens\":0,\"cache_read_input_tokens\":0,\"output_tokens\":1}}}\n\n"
    "event: content_block_start\n"
    "data: {\"type\":\"content_block_start\",\"index\":0,"
    "\"content_block\":{\"type\":\"text\",\"text\":\"\"}}\n\n"
    "event: ping\n"
    "data: {\"type\": \"ping\"}\n\n";
static const char TOKEN[] =
    "event: content_block_delta\n"
    "data: {\"type\":\"content_block_delta\",\"index\":0,"
    "\"delta\":{\"type\":\"text_delta\",\"text\":\"%s\"}}\n\n";
static const char END[] =
    "event: content_block_stop\n"
    "data: {\"type\":\"content_block_stop\",\"index\":0}\n\n"
    "event: message_delta\n"
    "data: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\","
    "\"stop_sequence\":null},\"usage\":{\"output_tokens\":%d}}\n\n"
    "event: message_stop\n"
    "data: {\"type\":\"message_stop\"}\n\n";
static const char JSON[] =
    "{\"id\":\"msg_01mock00000000000000000\",\"type\":\"message\",\"role\":\"assistant\","
    "\"model\":\"claude-mock\",\"content\":[{\"type\":\"text\","
    "\"text\":\"Hello there! How can I help you today?\"}],\"stop_reason\":\"end_turn\","
    "\"stop_sequence\":null,\"usage\":{\"input_tokens\":11,\"cache_creation_input_tokens\":0,"
    "\"cache_read_input_tokens\":0,\"output_tokens\":10}}";
static const char LAST_CHUNK[] = "0\r\n\r\n";

// Escapes, a line break and a letter outside ASCII are among them, as in real answers.
static const char *WORDS[16] = {"Hello",   " world",        " the",  " quick",
                                " brown",  " fox",          " jumps", "\\n\\n",
                                " over",   " \\\"lazy\\\"", " dog",  " caf\xc3\xa9",
                                " and",    " token",        " stream", "."};
static const char *SENTENCE[10] = {"Hello", " there", "!",    " How",  " can",
                                   " I",    " help",  " you", " today", "?"};

typedef struct {
    char bytes[64 * 1024];
    size_t length;
} Answer;

static Answer burst, one, sentence, json;

static size_t write_chunk(char *to, const char *bytes, size_t length) {
    int head = sprintf(to, "%zx\r\n", length);
    memcpy(to + head, bytes, length);
    memcpy(to + head + length, "\r\n", 2);
    return head + length + 2;
}

static size_t write_token(char *to, const char *word) {
    char event[512];
    return write_chunk(to, event, sprintf(event, TOKEN, word));
}

static size_t write_start(char *to) {
    size_t head = sizeof HEAD - 1;
    memcpy(to, HEAD, head);
    return head + write_chunk(to + head, START, sizeof START - 1);
}

static size_t write_end(char *to, int tokens) {
    char events[1024];
    size_t length = write_chunk(to, events, sprintf(events, END, tokens));
    memcpy(to + length, LAST_CHUNK, sizeof LAST_CHUNK - 1);
    return length + sizeof LAST_CHUNK - 1;
}

// A whole stream in one buffer: several events to a chunk, as a fast upstream behind a CDN sends them.
static void build_stream(Answer *answer, const char **words, int word_count, int tokens) {
    char group[16 * 1024];
    size_t group_length = 0;
    answer->length = write_start(answer->bytes);
    for (int i = 0; i < tokens; i++) {
        group_length += sprintf(group + group_length, TOKEN, words[i % word_count]);
        if ((i + 1) % TOKENS_PER_CHUNK == 0 || i == tokens - 1) {
            answer->length += write_chunk(answer->bytes + answer->length, group, group_length);
            group_length = 0;
        }
    }
    answer->length += write_end(answer->bytes + answer->length, tokens);
}

static void build_answers(void) {
    build_stream(&burst, WORDS, 16, BURST_TOKENS);
    build_stream(&one, WORDS, 16, 1);
    build_stream(&sentence, SENTENCE, 10, 10);
    json.length = sprintf(json.bytes,
                          "HTTP/1.1 200 OK\r\n"
                          "Content-Type: application/json\r\n"
                          "Content-Length: %zu\r\n"
                          "Connection: keep-alive\r\n\r\n%s",
                          sizeof JSON - 1, JSON);
}

// ---- Connections ----

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void watch(int operation, int fd, unsigned events) {
    struct epoll_event event = {events, {.fd = fd}};
    epoll_ctl(epoll, operation, fd, &event);
}

static void stop_pacing(Connection *c) {
    if (!c->tokens_total) return;
    if (c->previous) c->previous->next = c->next;
    if (c->next) c->next->previous = c->previous;
    if (paced == c) paced = c->next;
    c->previous = c->next = NULL;
    c->tokens_total = 0;
}

static void close_connection(Connection *c) {
    if (c->tokens_total || c->out) aborted++;
    stop_pacing(c);
    connections[c->fd] = NULL;
    open_connections--;
    close(c->fd);
    free(c->in);
    free(c->out);
    free(c);
}

// Sends what waits in c->out. False when the connection is gone.
static int flush_output(Connection *c) {
    while (c->out_offset < c->out_length) {
        ssize_t sent =
            send(c->fd, c->out + c->out_offset, c->out_length - c->out_offset, MSG_NOSIGNAL);
        if (sent < 0 && errno == EAGAIN) return 1;
        if (sent < 0) {
            close_connection(c);
            return 0;
        }
        c->out_offset += sent;
    }
    free(c->out);
    c->out = NULL;
    c->out_length = c->out_offset = 0;
    watch(EPOLL_CTL_MOD, c->fd, EPOLLIN | EPOLLRDHUP);
    return 1;
}

// Sends bytes, and keeps what the socket does not take. False when the connection is gone.
static int put(Connection *c, const char *bytes, size_t length) {
    size_t sent = 0;
    if (!c->out) {
        ssize_t result = send(c->fd, bytes, length, MSG_NOSIGNAL);
        if (result == (ssize_t)length) return 1;
        if (result < 0 && errno != EAGAIN) {
            close_connection(c);
            return 0;
        }
        sent = result < 0 ? 0 : result;
        watch(EPOLL_CTL_MOD, c->fd, EPOLLIN | EPOLLOUT | EPOLLRDHUP);
    }
    c->out = realloc(c->out, c->out_length + length - sent);
    memcpy(c->out + c->out_length, bytes + sent, length - sent);
    c->out_length += length - sent;
    return 1;
}

// ---- Paced streams ----

// The first token goes out with the headers. The second follows after half a period to one and a half,
// a different share for each stream, so that streams opened together do not beat in step.
static int start_pacing(Connection *c, double period, int tokens) {
    static double phase;
    char bytes[4096];
    size_t length = write_start(bytes);
    length += write_token(bytes + length, WORDS[0]);
    phase += 0.618034;
    if (phase >= 1) phase -= 1;
    c->tokens_sent = 1;
    c->tokens_total = tokens;
    c->period = period;
    c->due = now() + period * (0.5 + phase);
    c->previous = NULL;
    c->next = paced;
    if (paced) paced->previous = c;
    paced = c;
    token_writes++;
    return put(c, bytes, length);
}

// A late timer stretches a stream and never bunches it: two tokens of one stream are at least half a
// period apart, or the proxy would read both at once and "one write per token" would not be its fault.
static void send_due_tokens(void) {
    double t = now();
    for (Connection *c = paced, *next; c; c = next) {
        char bytes[2048];
        next = c->next;
        if (t < c->due) continue;
        c->due += c->period;
        if (c->due < t + c->period / 2) c->due = t + c->period / 2;
        if (c->tokens_sent < c->tokens_total) {
            token_writes++;
            put(c, bytes, write_token(bytes, WORDS[c->tokens_sent++ % 16]));
        } else {
            size_t length = write_end(bytes, c->tokens_total);
            stop_pacing(c);
            finished++;
            put(c, bytes, length);
        }
    }
}

// ---- Requests ----

static int put_stats(Connection *c) {
    char body[512], bytes[1024];
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    long cpu = (usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1000000L +
               usage.ru_utime.tv_usec + usage.ru_stime.tv_usec;
    int length = sprintf(body,
                         "{\"open\":%ld,\"requests\":%ld,\"finished\":%ld,\"aborted\":%ld,"
                         "\"token_writes\":%ld,\"cpu_microseconds\":%ld}",
                         open_connections, requests, finished, aborted, token_writes, cpu);
    return put(c, bytes,
               sprintf(bytes,
                       "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                       "Content-Length: %d\r\n\r\n%s",
                       length, body));
}

// Where the first request in the buffer ends, or 0 when it is not all there yet.
static size_t request_length(const Connection *c, size_t head) {
    const char *length = strcasestr(c->in, "\r\ncontent-length:");
    const char *chunked = strcasestr(c->in, "\r\ntransfer-encoding: chunked");
    if (chunked && chunked < c->in + head) {
        const char *end = memmem(c->in + head - 2, c->in_length - head + 2, "\r\n0\r\n\r\n", 7);
        return end ? (size_t)(end - c->in) + 7 : 0;
    }
    size_t total = head;
    if (length && length < c->in + head) total += strtoul(length + 17, NULL, 10);
    return c->in_length >= total ? total : 0;
}

// The value of "model", and nothing else of the body: a prompt may say "burst" too.
static void read_model(const char *body, char *model, size_t size) {
    const char *key = strstr(body, "\"model\"");
    *model = 0;
    if (key) key = strchr(key + 7, '"');
    if (!key) return;
    size_t length = strcspn(key + 1, "\"");
    if (length >= size) length = size - 1;
    memcpy(model, key + 1, length);
    model[length] = 0;
}

static int answer(Connection *c, const char *body) {
    char model[128];
    const char *pace;
    int every = 1, tokens = BURST_TOKENS;
    int stream = strstr(body, "\"stream\":true") || strstr(body, "\"stream\": true");
    Answer *whole = &burst;
    read_model(body, model, sizeof model);
    requests++;
    if (stream && (pace = strstr(model, "paced-"))) {
        sscanf(pace, "paced-%dx%d", &every, &tokens);
        return start_pacing(c, (every < 1 ? 1 : every) * 0.010, tokens < 1 ? 1 : tokens);
    }
    if (!stream) {
        whole = &json;
    } else if (strstr(model, "json")) {
        whole = &sentence;
    } else if (strstr(model, "one")) {
        whole = &one;
    }
    finished++;
    return put(c, whole->bytes, whole->length);
}

// Answers every complete request in the buffer.
static void handle(Connection *c) {
    for (;;) {
        c->in[c->in_length] = 0;
        char *blank = strstr(c->in, "\r\n\r\n");
        if (!blank) return;
        size_t head = blank - c->in + 4;
        size_t total = request_length(c, head);
        if (!total) return;
        int stats = !strncmp(c->in, "GET /stats", 10);
        char saved = c->in[total];
        c->in[total] = 0;
        if (!(stats ? put_stats(c) : answer(c, c->in + head))) return;
        c->in[total] = saved;
        c->in_length -= total;
        memmove(c->in, c->in + total, c->in_length);
    }
}

static void read_input(Connection *c) {
    if (c->in_length + 1 >= c->in_capacity) {
        c->in_capacity = c->in_capacity ? c->in_capacity * 2 : 8192;
        c->in = realloc(c->in, c->in_capacity);
    }
    ssize_t received = recv(c->fd, c->in + c->in_length, c->in_capacity - c->in_length - 1, 0);
    if (received < 0 && errno == EAGAIN) return;
    if (received <= 0 || c->in_length + received > MAX_REQUEST) {
        close_connection(c);
        return;
    }
    c->in_length += received;
    handle(c);
}

static void accept_all(int listener) {
    int fd, on = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        if (fd >= MAX_CONNECTIONS) {
            close(fd);
            continue;
        }
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        connections[fd] = calloc(1, sizeof(Connection));
        connections[fd]->fd = fd;
        open_connections++;
        watch(EPOLL_CTL_ADD, fd, EPOLLIN | EPOLLRDHUP);
    }
}

// ---- Main ----

static int listen_on(int port) {
    int on = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_port = htons(port),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 4096)) {
        perror("mock: cannot listen");
        exit(1);
    }
    return listener;
}

static int start_timer(void) {
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    struct itimerspec every = {{0, TICK_NANOSECONDS}, {0, TICK_NANOSECONDS}};
    timerfd_settime(timer, 0, &every, NULL);
    return timer;
}

static void raise_file_limit(void) {
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
}

int main(int argc, char **argv) {
    struct epoll_event events[512];
    signal(SIGPIPE, SIG_IGN);
    raise_file_limit();
    build_answers();
    epoll = epoll_create1(0);
    int listener = listen_on(argc > 1 ? atoi(argv[1]) : 9900), timer = start_timer();
    watch(EPOLL_CTL_ADD, listener, EPOLLIN);
    watch(EPOLL_CTL_ADD, timer, EPOLLIN);
    for (;;) {
        int count = epoll_wait(epoll, events, 512, -1), accept_now = 0, tick_now = 0;
        for (int i = 0; i < count; i++) {
            int fd = events[i].data.fd;
            if (fd == listener) {
                accept_now = 1;
            } else if (fd == timer) {
                tick_now = 1;
            } else {
                Connection *c = connections[fd];
                if (!c) continue;
                if (events[i].events & EPOLLOUT && c->out && !flush_output(c)) continue;
                if (events[i].events & (EPOLLHUP | EPOLLERR)) {
                    close_connection(c);
                } else if (events[i].events & EPOLLIN) {
                    read_input(c);
                } else if (events[i].events & EPOLLRDHUP) {
                    close_connection(c);
                }
            }
        }
        // Afterwards, so that a number freed above is not taken by a new connection within one batch.
        if (tick_now) {
            unsigned long expirations;
            if (read(timer, &expirations, sizeof expirations) > 0) send_due_tokens();
        }
        if (accept_now) accept_all(listener);
    }
}
