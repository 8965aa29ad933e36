/* Any bytes as a model file of llama2.c: refused with a text, or tensors that fill the file from its header on, every row of which can be read. A header that would be right for a file of another size gets one. */
#include "fuzz.h"
#include "../../examples/common/llama2c.h"

typedef struct fuzz_file { const uint8_t *data; size_t size; uint64_t stated; } fuzz_file;

static int file_open(void *user, const char *path, llmpar_io_mode mode, int *handle)
{
    (void)user, (void)path;
    *handle = 7;
    return mode == LLMPAR_IO_READ ? 0 : 30;
}
static int file_close(void *user, int handle)
{
    (void)user;
    REQUIRE(handle == 7);
    return 0;
}
static int file_look(void *user, const char *path, llmpar_io_kind *kind, uint64_t *bytes)
{
    (void)path;
    *kind = LLMPAR_IO_FILE;
    *bytes = ((fuzz_file *)user)->stated;
    return 0;
}
static int file_read(void *user, int handle, void *data, size_t bytes, uint64_t offset, size_t *got)
{
    const fuzz_file *f = (const fuzz_file *)user;
    REQUIRE(handle == 7 && offset <= f->stated);
    *got = bytes < f->stated - offset ? bytes : (size_t)(f->stated - offset);
    memset(data, 0, *got);
    if (offset < f->size) memcpy(data, f->data + offset, *got < f->size - offset ? *got : f->size - (size_t)offset);
    return 0;
}

static void look(llmpar_llama2c *model, uint64_t size)
{
    llmpar_error error;
    uint64_t at = 28;
    llmpar_error_clear(&error);
    for (int32_t i = 0; i < model->count; i++) {
        const llmpar_safetensor *t = &model->tensor[i];
        int64_t elements, columns = t->dims == 2 ? t->shape[1] : 1;
        REQUIRE(llmpar_extent_product(t->shape, t->dims, &elements) && (uint64_t)elements * 4 == t->bytes && t->begin >= at && t->begin + t->bytes <= size);
        at = t->begin + t->bytes;
        if (i >= 20 && i + 3 < model->count) continue;
        float *rows = (float *)malloc(t->bytes + 1);
        REQUIRE(llmpar_llama2c_read(model, t, 0, t->shape[0], rows, &error) == LLMPAR_OK);
        REQUIRE(llmpar_llama2c_read(model, t, t->shape[0] - 1, 1, rows + (t->shape[0] - 1) * columns, &error) == LLMPAR_OK);
        free(rows);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_file file = { data, size, size };
    for (int again = 0; again < 2; again++) {
        llmpar_heap heap;
        llmpar_error error;
        llmpar_llama2c *model = NULL;
        llmpar_io io = *llmpar_io_system();
        io.user = &file;
        io.open = file_open, io.close = file_close, io.look = file_look, io.read = file_read;
        fuzz_begin(&heap, &error);
        llmpar_status status = llmpar_llama2c_open(&heap, &io, "model.bin", &model, &error);
        REQUIRE((status == LLMPAR_OK) == (model != NULL));
        if (status) fuzz_refused(status, &error);
        else look(model, file.stated);
        llmpar_llama2c_close(model);
        fuzz_end(&heap, file.stated, 64, 2048);
        const char *other = status ? strstr(error.text, "its header makes it ") : NULL;
        file.stated = other ? strtoull(other + 20, NULL, 10) : 0;
        if (!other || file.stated > 1 << 18) break;
    }
    return 0;
}
