/* An external TFLite delegate for tests, in the shapes that accelerators' libraries come in.
 *
 * What it does is chosen when it is compiled: -DVARIANT=LEAVES_ALL and so on. The structs are those of TensorFlow
 * Lite's C API (tensorflow/lite/core/c/common.h), cut off after the last member that is used here.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { LEAVES_ALL, TAKES_ALL, LIES, FAILS_IN_PREPARE, FAILS_TO_CREATE, ABORTS, HANGS, NEEDS_OPTION };

typedef struct { int size; int data[]; } IntArray;
typedef struct { float scale; int32_t zero_point; } Quantisation;
typedef struct {
    int type; void *data; IntArray *dims; Quantisation params; int allocation; size_t bytes; const void *mapped;
    const char *name; void *delegate; int handle; _Bool stale, variable; int quantisation; void *quantisation_params;
    void *sparsity; const IntArray *dims_signature;
} Tensor;
typedef struct { IntArray *inputs, *outputs; } Node;
typedef struct Context Context;
typedef struct {
    void *(*init)(Context *, const char *, size_t); void (*free)(Context *, void *);
    int (*prepare)(Context *, Node *); int (*invoke)(Context *, Node *); const char *(*profile)(const Context *, const Node *);
    int32_t builtin_code; const char *name; int version; void *external, *async; uint64_t inplace; void *later[4];
} Registration;
struct Context {
    size_t tensors_size; int (*plan)(Context *, IntArray **); Tensor *tensors; void *impl;
    int (*resize)(Context *, Tensor *, IntArray *); void (*report)(Context *, const char *, ...); void *add_tensors;
    void *get_node; int (*replace)(Context *, Registration, const IntArray *, void *delegate);
};
typedef struct Delegate {
    void *data; int (*prepare)(Context *, struct Delegate *); void *copy_from, *copy_to, *free_handle;
    int64_t flags; void *opaque; void *later[4];
} Delegate;

/* The answer of a chain of operators that change nothing: its input. */
static int invoke(Context *context, Node *node) {
    Tensor *in = &context->tensors[node->inputs->data[0]], *out = &context->tensors[node->outputs->data[0]];
    memcpy(out->data, in->data, out->bytes);
    if (VARIANT == LIES) ((char *)out->data)[0] ^= 1;
    return 0;
}

static int prepare(Context *context, Delegate *delegate) {
    IntArray *plan;
    if (VARIANT == FAILS_IN_PREPARE) {
        context->report(context, "the accelerator is on fire");
        return 1;
    }
    if (VARIANT != TAKES_ALL && VARIANT != LIES) return 0;
    if (context->plan(context, &plan)) return 1;
    return context->replace(context, (Registration){.invoke = invoke, .name = "Copy", .version = 1}, plan, delegate);
}

Delegate *tflite_plugin_create_delegate(char **keys, char **values, size_t count, void (*error)(const char *)) {
    if (VARIANT == ABORTS) abort();
    if (VARIANT == HANGS) sleep(600);
    if (VARIANT == FAILS_TO_CREATE) { error("no device is plugged in"); return NULL; }
    if (VARIANT == NEEDS_OPTION && (count != 1 || strcmp(keys[0], "device") || strcmp(values[0], "usb:0"))) {
        error("option device is not usb:0");
        return NULL;
    }
    Delegate *delegate = calloc(1, sizeof *delegate);
    delegate->prepare = prepare;
    return delegate;
}

void tflite_plugin_destroy_delegate(Delegate *delegate) { free(delegate); }
