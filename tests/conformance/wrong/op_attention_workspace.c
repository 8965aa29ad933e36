/* expect: attention */
/* expect: of workspace, which has 8 elements of 1 bytes */
/* Asks for 8 bytes of scratch and uses 16. */
#include <string.h>

static llmpar_status (*original)(llmpar_device *device, llmpar_stream *stream, const llmpar_attention_args *args);
static size_t (*original_workspace)(llmpar_device *device, const llmpar_attention_args *args);
static size_t workspace(llmpar_device *device, const llmpar_attention_args *a) { (void)device; (void)a; return 8; }
static llmpar_status attention(llmpar_device *device, llmpar_stream *stream, const llmpar_attention_args *a)
{
    static char own[1 << 20];
    llmpar_attention_args args = *a;
    memset(a->workspace, 0, 16);
    args.workspace = own;
    args.workspace_bytes = original_workspace(device, a);
    return original(device, stream, &args);
}

void grade_patch(llmpar_device *table)
{
    original = table->attention;
    original_workspace = table->attention_workspace;
    table->attention = attention;
    table->attention_workspace = workspace;
}
