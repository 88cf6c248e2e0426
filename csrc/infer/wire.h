/* The messages of a pipeline that decodes.
 *
 * Rank r of P has the layers, exits and cache of stage r. Rank 0 is the client: requests come to
 * it, and it hands out the events. All other ranks serve. There are two kinds of messages.
 *
 * Frames go from every rank to the next one, one stream in one order, and each rank handles them in
 * that order. A frame is a head of fixed size (tag EE_TAG_HEAD) and, where the head says so, a body
 * (EE_TAG_BODY); both are started together.
 *
 *   EE_FRAME_ADD   a sequence: slot, number, and the request as the body. Every rank gives it the
 *                  same place in its cache.
 *   EE_FRAME_PASS  rows: their descriptions, then their hidden states. A rank runs its layers and
 *                  passes on what is left of the rows. Rows of several sequences may come together;
 *                  rows of a sequence come in ascending positions. A row that has left at an exit
 *                  goes on to the last rank, so that all keys and values are written.
 *   EE_FRAME_END   the sequence at a slot is over: its place in the cache is free.
 *   EE_FRAME_STOP  the server returns.
 *
 * Answers go to rank 0 as soon as an exit has decided: for every pass, and every exit behind rank 0
 * that looks at one of its rows, a head and a record for each row that it looked at, by ascending
 * slots. The final exit answers every pass, also where it looks at nothing: rank 0 knows from it
 * that the pass is through. Which exits look at which rows follows from the requests and the
 * answers before, so rank 0 knows which answers to expect and how long each is. Their tags differ
 * among the passes under way, so rank 0 takes them in the order in which it needs them.
 *
 * Rank 0 has at most `window` passes under way: before the next one it takes all answers of the
 * oldest. So no rank ever waits for a place to send from, and buffers are bounded.
 *
 * Waiting. A server waits for the head of a frame without limit: a client that asks for nothing is
 * no failure. All other waits end after comm->timeout seconds: a body, an answer, room to send. A
 * rank that fails aborts the job, and the calls of all others fail with its message. */
#ifndef EE_WIRE_H
#define EE_WIRE_H

#include "comm/comm.h"
#include "infer/engine.h"

EE_EXTERN_C_BEGIN

enum { EE_TAG_HEAD = 1, EE_TAG_BODY = 2, EE_TAG_ANSWER = 3 };

enum ee_frame_kind { EE_FRAME_ADD, EE_FRAME_PASS, EE_FRAME_END, EE_FRAME_STOP };

struct ee_frame {
    int32_t kind;
    int32_t slot, number; /* ADD, END: place in the cache; ADD: number of the sequence */
    int32_t rows;         /* PASS */
    int64_t pass;         /* PASS: passes are counted from 0 */
    int64_t bytes;        /* of the body */
};

/* A row as it travels; its hidden state follows all descriptions. */
struct ee_wire_row {
    int32_t slot, position;
    int32_t token; /* that the row was made from */
    int32_t kind;  /* enum ee_row_kind */
    int32_t next;  /* the token that follows in the text, where the row has left; else -1 */
};

struct ee_answer_head {
    int64_t pass;
    int32_t exit, count;
};

enum ee_outcome {
    EE_OUTCOME_STAYS,      /* the row goes on undecided */
    EE_OUTCOME_TOKEN,      /* it made a token */
    EE_OUTCOME_FULL_DEPTH, /* the final exit's view of a row that left early */
    EE_OUTCOME_FAILED,     /* its logits were not finite */
};

struct ee_answer {
    int32_t outcome; /* enum ee_outcome */
    struct ee_event event;
    struct ee_event_exit said; /* by this exit */
};

/* A message in the making or under way. */
struct ee_parcel {
    ee_comm_request request;
    struct ee_frame frame;
    char *data;
    size_t capacity;
};

struct ee_wire {
    struct ee_comm *comm;
    int32_t window, exits;
    int64_t frames;            /* sent so far */
    struct ee_parcel *frame;   /* [2 window], in turn */
    struct ee_parcel *answers; /* [window, exits] */
    struct ee_parcel received; /* the frame that came last, or an answer */
};

/* window: passes under way at most; exits: the final one included. */
EE_WARN_UNUSED enum ee_status ee_wire_create(struct ee_wire *wire, struct ee_comm *comm,
                                             int32_t window, int32_t exits);
/* Nothing may be under way unless the job was aborted. */
void ee_wire_free(struct ee_wire *wire);

/* Sends a frame to the next rank: `begin` gives the memory for its body, frame->bytes long, `send`
 * starts it. Nothing is sent behind the last rank. */
EE_WARN_UNUSED enum ee_status ee_wire_begin(struct ee_wire *wire, const struct ee_frame *frame,
                                            char **body);
EE_WARN_UNUSED enum ee_status ee_wire_send(struct ee_wire *wire);

/* The next frame from the rank before; its body stays valid until the next call. */
EE_WARN_UNUSED enum ee_status ee_wire_receive(struct ee_wire *wire, struct ee_frame *frame,
                                              const char **body);

/* Passes a frame on as it came. */
EE_WARN_UNUSED enum ee_status ee_wire_forward(struct ee_wire *wire, const struct ee_frame *frame,
                                              const char *body);

/* Starts the answer of an exit to rank 0: the memory for its records, and the start. */
EE_WARN_UNUSED enum ee_status ee_wire_begin_answer(struct ee_wire *wire, int64_t pass, int32_t exit,
                                                   int32_t count, struct ee_answer **records);
EE_WARN_UNUSED enum ee_status ee_wire_send_answer(struct ee_wire *wire, int64_t pass, int32_t exit);

/* Waits for the answer of an exit on rank `from`; the records stay valid until the next call. */
EE_WARN_UNUSED enum ee_status ee_wire_read_answer(struct ee_wire *wire, int32_t from, int64_t pass,
                                                  int32_t exit, int32_t count,
                                                  const struct ee_answer **records);

/* Returns once all that this rank sent is out of its hands. */
EE_WARN_UNUSED enum ee_status ee_wire_flush(struct ee_wire *wire);

/* A request as bytes; `unpack` points into them. */
size_t ee_request_bytes(const struct ee_request *request);
void ee_request_pack(char *bytes, const struct ee_request *request);
void ee_request_unpack(struct ee_request *request, const char *bytes);

EE_EXTERN_C_END

#endif
