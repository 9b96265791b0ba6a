/* Emulates Intel's AMX-BF16 for tests on processors without it:
 *
 *     gcc -O2 -shared -fPIC -o libemulate_amx.so tests/emulate_amx.c
 *     LD_PRELOAD=./libemulate_amx.so SECATEUR_KERNEL=amx PROGRAM
 *
 * Without AMX its instructions raise SIGILL; the handler decodes them, does what they say on tiles of its own, and
 * steps over them. Only the forms that secateur uses are known: any other illegal instruction ends the program.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>

struct tile { uint8_t bytes[16][64]; };

/* initial-exec: a handler must not allocate. */
static __thread __attribute__((tls_model("initial-exec"))) struct tile tiles[8];
static __thread __attribute__((tls_model("initial-exec"))) uint16_t colsb[8];
static __thread __attribute__((tls_model("initial-exec"))) uint8_t rows[8];

/* The general registers in the order in which instructions number them. */
static const int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                              REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

static float widen(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static void multiply(int c, int a, int b) {
    for (int m = 0; m < rows[c]; m++) {
        float *sums = (float *)tiles[c].bytes[m];
        const uint16_t *left = (const uint16_t *)tiles[a].bytes[m];
        for (int k = 0; k < colsb[a] / 4; k++) {
            const uint16_t *right = (const uint16_t *)tiles[b].bytes[k];
            for (int n = 0; n < colsb[c] / 4; n++) {
                sums[n] += widen(left[2 * k]) * widen(right[2 * n]);
                sums[n] += widen(left[2 * k + 1]) * widen(right[2 * n + 1]);
            }
        }
    }
}

/* Where the memory operand lies; moves `*at` behind it. `step` becomes the index register, which holds the distance
 * of rows and is not scaled into the start. */
static uint8_t *address(const uint8_t **at, const greg_t *registers, int vex_x, int vex_b, int64_t *step) {
    int modrm = *(*at)++, mode = modrm >> 6, low = modrm & 7;
    int64_t start = 0;
    *step = 0;
    if (low == 4) {
        int sib = *(*at)++, index = (sib >> 3 & 7) | vex_x << 3, base = (sib & 7) | vex_b << 3;
        if (index != 4)
            *step = registers[order[index]] << (sib >> 6);
        if ((base & 7) == 5 && mode == 0)
            mode = 4; /* no base, 32 bits of displacement */
        else
            start = registers[order[base]];
    } else if (low == 5 && mode == 0) {
        int32_t relative;
        memcpy(&relative, *at, 4);
        *at += 4;
        return (uint8_t *)*at + relative; /* from the end of the instruction: none here has an immediate */
    } else {
        start = registers[order[low | vex_b << 3]];
    }
    if (mode == 1)
        start += (int8_t) * (*at)++;
    if (mode == 2 || mode == 4) {
        int32_t displacement;
        memcpy(&displacement, *at, 4);
        *at += 4;
        start += displacement;
    }
    return (uint8_t *)start;
}

/* Does the instruction at `at`; gives its end, or nothing when it is another one. */
static const uint8_t *emulate(const uint8_t *at, const greg_t *registers) {
    if (at[0] != 0xc4 || (at[1] & 0x1f) != 2)
        return NULL;
    int vex_x = !(at[1] >> 6 & 1), vex_b = !(at[1] >> 5 & 1);
    int prefix = at[2] & 3, source = ~(at[2] >> 3) & 15, opcode = at[3], modrm = at[4];
    int tile = modrm >> 3 & 7;
    int64_t step;
    at += 4;
    if (opcode == 0x49 && prefix == 0 && modrm == 0xc0) { /* tilerelease */
        memset(rows, 0, sizeof rows);
        return at + 1;
    }
    if (opcode == 0x49 && prefix == 0 && modrm >> 6 != 3) { /* ldtilecfg */
        const uint8_t *shape = address(&at, registers, vex_x, vex_b, &step);
        shape += step; /* here an index is only a part of the address */
        memcpy(colsb, shape + 16, sizeof colsb);
        memcpy(rows, shape + 48, sizeof rows);
        memset(tiles, 0, sizeof tiles);
        return at;
    }
    if (opcode == 0x49 && prefix == 3 && modrm >> 6 == 3) { /* tilezero */
        memset(&tiles[tile], 0, sizeof tiles[tile]);
        return at + 1;
    }
    if (opcode == 0x4b && (prefix == 3 || prefix == 2)) { /* tileloadd, tilestored */
        uint8_t *memory = address(&at, registers, vex_x, vex_b, &step);
        if (prefix == 3)
            memset(&tiles[tile], 0, sizeof tiles[tile]);
        for (int row = 0; row < rows[tile]; row++) {
            uint8_t *line = memory + row * step;
            if (prefix == 3)
                memcpy(tiles[tile].bytes[row], line, colsb[tile]);
            else
                memcpy(line, tiles[tile].bytes[row], colsb[tile]);
        }
        return at;
    }
    if (opcode == 0x5c && prefix == 2 && modrm >> 6 == 3) { /* tdpbf16ps */
        multiply(tile, modrm & 7, source);
        return at + 1;
    }
    return NULL;
}

static void on_illegal(int signal_number, siginfo_t *info, void *context) {
    (void)info;
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const uint8_t *end = emulate((const uint8_t *)registers[REG_RIP], registers);
    if (end)
        registers[REG_RIP] = (greg_t)end;
    else
        signal(signal_number, SIG_DFL); /* meets it again, and dies of it */
}

__attribute__((constructor)) static void install(void) {
    struct sigaction action = {.sa_sigaction = on_illegal, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    sigaction(SIGILL, &action, NULL);
}

/* Grants the tile registers, which the system would refuse; all other calls go on to it. */
long syscall(long number, ...) {
    va_list list;
    va_start(list, number);
    long a = va_arg(list, long), b = va_arg(list, long), c = va_arg(list, long);
    long d = va_arg(list, long), e = va_arg(list, long), f = va_arg(list, long);
    va_end(list);
    if (number == SYS_arch_prctl && a == 0x1023 && b == 18)
        return 0;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    if (result < 0 && result > -4096) {
        errno = (int)-result;
        return -1;
    }
    return result;
}
