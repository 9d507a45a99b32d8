// drv: a load driver that counts tokens and the network writes that carried them.
//
//     cc -O2 -o drv drv.c && ./drv -p 8000 -P /api/anthropic -b '{"messages": …}'        (Linux)
//
//     -p PORT      port on 127.0.0.1 (8000)            -c COUNT    requests at a time (1)
//     -P PATH      path to POST to (/)                 -d SECONDS  start no request after this (5)
//     -b BODY      request body ({})                   -n COUNT    start no more requests than this
//     -H HEADER    one more header; repeatable         -R MILLIS   open the first COUNT over this long
//     -k NEEDLE    what a token looks like             -T SECONDS  give up on what still runs after -d
//
// In BODY and HEADER, "%d" becomes the number of the request (nine digits: no two requests are alike,
// so no cache can answer) and "%k" that number modulo 8 (one digit: eight callers).
//
// A token is a NEEDLE in the body of the answer that is not followed by a quote: the end of a stream
// may carry an empty one. A write is one chunk of the chunked transfer coding, which is what the server
// wrote at once however TCP delivers it; a write counts when a token ends in it. Connections are kept
// alive. The time to the first token runs from the start of the request, connecting included.
//
// When the first -c requests all have their first token it prints "open", and at the end one line of JSON.
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
#include <time.h>
#include <unistd.h>

#define MAX_HEAD 16384
#define CALLERS 8

typedef enum { IDLE, CONNECTING, READING_HEAD, READING_BODY } State;
typedef enum { CHUNK_SIZE, CHUNK_DATA, CHUNK_END, TRAILER, NOT_CHUNKED } Framing;

typedef struct {
    int fd;
    State state;
    long number;  // of the request
    double started, first_token;
    char head[MAX_HEAD];
    int head_length, close_after;
    Framing framing;
    long left;          // bytes of the chunk, or of a body that is not chunked; -1: until it closes
    char size_line[32];
    int size_length;
    int matched;        // letters of the needle matched so far
    int chunk_counted;  // this chunk has been counted as a write
    long tokens, writes;
} Connection;

static int port = 8000, concurrency = 1, ramp;
static long request_limit = 1L << 60;
static double seconds = 5, patience = 60;
static const char *path = "/", *body = "{}", *needle = "\"token\":\"";
static char headers[8192];

static int epoll, needle_length, *fallback;
static char request[1 << 17];
static int request_size;
static int number_at[64], number_count, caller_at[64], caller_count;

static double stop_at, *first_token_times;
static long started, finished, errors, bad_status, tokens, writes, answered_first, time_capacity;
static long fewest = -1, most, fewest_writes = -1, most_writes;
static char first_error[512];

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void note_error(const char *what, const char *detail) {
    if (!*first_error) snprintf(first_error, sizeof first_error, "%s %.300s", what, detail);
}

// ---- The request ----

// Placeholders have a fixed width, so one prepared buffer serves all: only digits change in it.
static void prepare_request(void) {
    size_t body_length = strlen(body);
    for (const char *at = body; (at = strstr(at, "%d")); at += 2) body_length += 9 - 2;
    for (const char *at = body; (at = strstr(at, "%k")); at += 2) body_length += 1 - 2;
    char *raw = NULL;
    if (asprintf(&raw,
                 "POST %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n"
                 "Accept: text/event-stream\r\n%sContent-Length: %zu\r\n\r\n%s",
                 path, port, headers, body_length, body) < 0 ||
        strlen(raw) * 5 > sizeof request) {
        fprintf(stderr, "drv: the request is too long\n");
        exit(2);
    }
    for (const char *from = raw; *from;) {
        if (!strncmp(from, "%d", 2) && number_count < 64) {
            number_at[number_count++] = request_size;
            request_size += 9;
            from += 2;
        } else if (!strncmp(from, "%k", 2) && caller_count < 64) {
            caller_at[caller_count++] = request_size++;
            from += 2;
        } else {
            request[request_size++] = *from++;
        }
    }
    free(raw);
}

static void number_request(long number) {
    char digits[16];
    snprintf(digits, sizeof digits, "%09ld", number % 1000000000);
    for (int i = 0; i < number_count; i++) memcpy(request + number_at[i], digits, 9);
    for (int i = 0; i < caller_count; i++) request[caller_at[i]] = '0' + number % CALLERS;
}

// ---- The life of a connection ----

static void watch(int operation, Connection *c, unsigned events) {
    struct epoll_event event = {events, {.ptr = c}};
    epoll_ctl(epoll, operation, c->fd, &event);
}

static void drop(Connection *c) {
    if (c->fd >= 0) close(c->fd);
    c->fd = -1;
    c->state = IDLE;
}

static void send_request(Connection *c) {
    number_request(c->number);
    c->state = READING_HEAD;
    watch(EPOLL_CTL_MOD, c, EPOLLIN);
    if (send(c->fd, request, request_size, MSG_NOSIGNAL) != request_size) {
        errors++;
        note_error("cannot send the request:", strerror(errno));
        drop(c);
    }
}

static void start(Connection *c) {
    if (started >= request_limit || now() >= stop_at) {
        drop(c);
        return;
    }
    c->number = started++;
    c->started = now();
    c->first_token = 0;
    c->head_length = c->close_after = c->size_length = c->matched = c->chunk_counted = 0;
    c->tokens = c->writes = 0;
    if (c->fd >= 0) {
        send_request(c);
        return;
    }
    int on = 1;
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_port = htons(port),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (c->fd < 0) {
        perror("drv: socket");
        exit(1);
    }
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    connect(c->fd, (struct sockaddr *)&address, sizeof address);
    c->state = CONNECTING;
    watch(EPOLL_CTL_ADD, c, EPOLLIN | EPOLLOUT);
}

// A failed request is not repeated by its connection: one failure is enough to void the run.
static void fail(Connection *c, const char *what, const char *detail) {
    errors++;
    note_error(what, detail);
    drop(c);
}

static void finish(Connection *c) {
    if (finished == time_capacity) {
        time_capacity = time_capacity ? time_capacity * 2 : 65536;
        first_token_times = realloc(first_token_times, time_capacity * sizeof(double));
    }
    first_token_times[finished++] = (c->first_token ? c->first_token : now()) - c->started;
    tokens += c->tokens;
    writes += c->writes;
    if (fewest < 0 || c->tokens < fewest) fewest = c->tokens;
    if (c->tokens > most) most = c->tokens;
    if (fewest_writes < 0 || c->writes < fewest_writes) fewest_writes = c->writes;
    if (c->writes > most_writes) most_writes = c->writes;
    if (c->close_after) drop(c);
    start(c);
}

// ---- Reading an answer ----

// Knuth-Morris-Pratt, one letter at a time: a token may lie across two reads or two chunks.
static void prepare_needle(void) {
    needle_length = strlen(needle);
    fallback = calloc(needle_length + 1, sizeof(int));
    for (int i = 1, matched = 0; i < needle_length; i++) {
        while (matched && needle[i] != needle[matched]) matched = fallback[matched];
        if (needle[i] == needle[matched]) matched++;
        fallback[i + 1] = matched;
    }
}

static void count_token(Connection *c) {
    c->tokens++;
    if (!c->chunk_counted) c->writes++;
    c->chunk_counted = 1;
    if (c->first_token) return;
    c->first_token = now();
    if (++answered_first == concurrency) {
        puts("open");
        fflush(stdout);
    }
}

static void read_letter(Connection *c, char letter) {
    if (c->matched == needle_length) {
        if (letter != '"') count_token(c);
        c->matched = fallback[c->matched];
    }
    while (c->matched && letter != needle[c->matched]) c->matched = fallback[c->matched];
    if (letter == needle[c->matched]) c->matched++;
}

// Takes bytes of the head; returns how many, or -1 when the answer makes no sense.
static int read_head(Connection *c, const char *bytes, int length) {
    int before = c->head_length, take = MAX_HEAD - 1 - before;
    if (take > length) take = length;
    memcpy(c->head + before, bytes, take);
    c->head_length += take;
    c->head[c->head_length] = 0;
    char *blank = strstr(c->head, "\r\n\r\n");
    if (!blank) return c->head_length == MAX_HEAD - 1 ? -1 : take;
    blank[2] = 0;
    if (strncmp(c->head, "HTTP/1.", 7)) return -1;
    if (atoi(c->head + 9) != 200) {
        bad_status++;
        note_error("bad status:", c->head);
    }
    char *content_length = strcasestr(c->head, "\ncontent-length:");
    c->close_after = !!strcasestr(c->head, "\nconnection: close");
    c->framing = NOT_CHUNKED;
    c->left = content_length ? atol(content_length + 16) : -1;
    if (strcasestr(c->head, "\ntransfer-encoding: chunked")) c->framing = CHUNK_SIZE;
    c->state = READING_BODY;
    return (int)(blank - c->head) + 4 - before;
}

// Takes bytes of the body. True when the answer is complete.
static int read_body(Connection *c, const char *bytes, int length) {
    for (int i = 0; i < length; i++) {
        char letter = bytes[i];
        switch (c->framing) {
            case CHUNK_SIZE:
                if (letter == '\n') {
                    c->size_line[c->size_length] = 0;
                    c->left = strtol(c->size_line, NULL, 16);
                    c->size_length = c->chunk_counted = 0;
                    c->framing = c->left ? CHUNK_DATA : TRAILER;
                } else if (c->size_length < (int)sizeof c->size_line - 1) {
                    c->size_line[c->size_length++] = letter;
                }
                break;
            case CHUNK_DATA:
                read_letter(c, letter);
                if (!--c->left) c->framing = CHUNK_END;
                break;
            case CHUNK_END:
                if (letter == '\n') c->framing = CHUNK_SIZE;
                break;
            case TRAILER:
                if (letter == '\n') return 1;
                break;
            case NOT_CHUNKED:
                read_letter(c, letter);
                if (c->left > 0) c->left--;
                break;
        }
    }
    return c->framing == NOT_CHUNKED && c->left == 0;
}

static void read_answer(Connection *c) {
    static char buffer[1 << 18];
    ssize_t received = recv(c->fd, buffer, sizeof buffer, 0);
    if (received < 0 && errno == EAGAIN) return;
    if (received <= 0) {
        int complete = c->state == READING_BODY && c->framing == NOT_CHUNKED && c->left < 0;
        c->close_after = 1;
        if (received == 0 && complete) {
            finish(c);
        } else {
            fail(c, "cut off:", received < 0 ? strerror(errno) : c->head);
        }
        return;
    }
    int at = 0;
    if (c->state == READING_HEAD) {
        at = read_head(c, buffer, received);
        if (at < 0) {
            fail(c, "not an HTTP answer:", c->head);
            return;
        }
    }
    if (c->state == READING_BODY && read_body(c, buffer + at, received - at)) finish(c);
}

static void handle(Connection *c, unsigned events) {
    if (c->state == CONNECTING) {
        int error = 0;
        socklen_t length = sizeof error;
        getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &length);
        if (error) {
            fail(c, "cannot connect:", strerror(error));
        } else if (events & EPOLLOUT) {
            send_request(c);
        }
    } else if (c->state != IDLE) {
        read_answer(c);
    }
}

// ---- Main ----

static void read_options(int argc, char **argv) {
    int option;
    while ((option = getopt(argc, argv, "p:P:b:H:k:c:d:n:R:T:")) != -1) switch (option) {
            case 'p': port = atoi(optarg); break;
            case 'P': path = optarg; break;
            case 'b': body = optarg; break;
            case 'k': needle = optarg; break;
            case 'c': concurrency = atoi(optarg); break;
            case 'd': seconds = atof(optarg); break;
            case 'n': request_limit = atol(optarg); break;
            case 'R': ramp = atoi(optarg); break;
            case 'T': patience = atof(optarg); break;
            case 'H': {
                size_t used = strlen(headers);
                snprintf(headers + used, sizeof headers - used, "%s\r\n", optarg);
                break;
            }
            default: exit(2);
        }
}

static void raise_file_limit(void) {
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
}

static int count_busy(const Connection *connections, int opened) {
    int busy = 0;
    for (int i = 0; i < opened; i++) busy += connections[i].state != IDLE;
    return busy;
}

static int compare(const void *left, const void *right) {
    double a = *(const double *)left, b = *(const double *)right;
    return a < b ? -1 : a > b;
}

static double percentile_ms(double share) {
    return finished ? first_token_times[(long)((finished - 1) * share + 0.5)] * 1e3 : 0;
}

static void print_escaped(const char *text) {
    for (; *text; text++) {
        if (*text == '"' || *text == '\\') putchar('\\');
        putchar((unsigned char)*text < ' ' ? ' ' : *text);
    }
}

static void report(double wall) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    double cpu = usage.ru_utime.tv_sec + usage.ru_stime.tv_sec +
                 (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
    qsort(first_token_times, finished, sizeof(double), compare);
    printf("{\"started\":%ld,\"finished\":%ld,\"errors\":%ld,\"bad_status\":%ld,\"tokens\":%ld,"
           "\"writes\":%ld,\"fewest_tokens\":%ld,\"most_tokens\":%ld,\"fewest_writes\":%ld,"
           "\"most_writes\":%ld,\"ttft_ms_p50\":%.3f,\"ttft_ms_p99\":%.3f,\"ttft_ms_max\":%.3f,"
           "\"wall_seconds\":%.3f,\"driver_cpu_seconds\":%.3f,\"first_error\":\"",
           started, finished, errors, bad_status, tokens, writes, fewest, most, fewest_writes,
           most_writes, percentile_ms(0.5), percentile_ms(0.99), percentile_ms(1), wall, cpu);
    print_escaped(first_error);
    puts("\"}");
}

int main(int argc, char **argv) {
    struct epoll_event events[1024];
    int opened = 0;
    read_options(argc, argv);
    signal(SIGPIPE, SIG_IGN);
    raise_file_limit();
    prepare_needle();
    prepare_request();
    epoll = epoll_create1(0);
    Connection *connections = calloc(concurrency, sizeof(Connection));
    for (int i = 0; i < concurrency; i++) connections[i].fd = -1;
    double begin = now(), t = begin;
    stop_at = begin + seconds;
    for (;; t = now()) {
        while (opened < concurrency && t - begin >= ramp / 1e3 * opened / concurrency) {
            start(&connections[opened++]);
        }
        int all_started = opened == concurrency || t >= stop_at || started >= request_limit;
        if (all_started && !count_busy(connections, opened)) break;
        if (t > stop_at + patience) {
            errors += count_busy(connections, opened);
            note_error("still running when patience ended:", "");
            break;
        }
        int count = epoll_wait(epoll, events, 1024, opened < concurrency ? 1 : 50);
        for (int i = 0; i < count; i++) handle(events[i].data.ptr, events[i].events);
    }
    report(now() - begin);
    return errors || bad_status;
}
