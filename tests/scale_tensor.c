/* scale_tensor FILE NAME FACTOR: plants an error for tests/verify_parity.sh: every number of one f32 tensor of a safetensors file is multiplied in place. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(int argc, char **argv)
{
    unsigned char length[8];
    char key[200];
    unsigned long bytes = 0, begin, end;
    FILE *f = argc == 4 ? fopen(argv[1], "r+b") : NULL;
    if (!f || fread(length, 1, 8, f) != 8) return 1;
    for (int i = 7; i >= 0; i--) bytes = bytes << 8 | length[i];
    char *header = (char *)calloc(bytes + 1, 1), *at;
    if (!header || fread(header, 1, bytes, f) != bytes) return 1;
    snprintf(key, sizeof key, "\"%s\":", argv[2]);
    if (!(at = strstr(header, key)) || !(at = strstr(at, "\"data_offsets\":[")) || sscanf(at, "\"data_offsets\":[%lu,%lu]", &begin, &end) != 2) return 1;
    for (unsigned long i = begin; i < end; i += 4) {
        float value;
        if (fseek(f, (long)(8 + bytes + i), SEEK_SET) || fread(&value, 4, 1, f) != 1) return 1;
        value *= (float)atof(argv[3]);
        if (fseek(f, (long)(8 + bytes + i), SEEK_SET) || fwrite(&value, 4, 1, f) != 1) return 1;
    }
    free(header);
    return fclose(f) != 0;
}
