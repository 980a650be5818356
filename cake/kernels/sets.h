/* The instruction sets: what each calls the operations of tile.h and attend.h, and which this CPU has.
   Included by matrix.c. */

#if defined(__x86_64__)

static inline __attribute__((always_inline)) int32_t four_bytes(const void *p)
{
    int32_t value;
    memcpy(&value, p, 4);
    return value;
}

/* Ties a sum to one register; left alone, GCC copies it about. */
#ifndef IN_REGISTER
#define IN_REGISTER(x) __asm__("" : "+x"(x))
#endif

/* Sums of products of bytes. */
static inline __attribute__((always_inline, target("avx2"))) __m256i dot4(__m256i sum, __m256i w, __m256i x)
{
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x));
    IN_REGISTER(sum);
    return sum;
}

static inline __attribute__((always_inline, target("avx2"))) __m256i dot8(__m256i sum, __m256i w, __m256i x)
{
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    IN_REGISTER(sum);
    return sum;
}

#define TARGET __attribute__((target("avx2,fma")))
#define NAME(x) avx2_##x
/* Sixteen-bit sums: 16 products of at most 15 * 127 stay below 2^15. */
#define DOT4 dot4
#define FOLD4(sum) _mm256_madd_epi16(sum, _mm256_set1_epi16(1))
/* |w| * (x with w's sign): two products of at most 127 * 127 stay below 2^15. */
#define DOT8 dot8
#define ZERO8 0
#include "avx.h"
#include "tile.h"

/* A compiler that does not know it yet compiles the rest. */
#if defined(__clang__) ? __clang_major__ >= 18 : __GNUC__ >= 11
#define KNOWS_AVXVNNI 1
#define TARGET __attribute__((target("avx2,fma,avxvnni")))
#define NAME(x) avxvnni_##x
#define DOT4(sum, w, x) _mm256_dpbusd_avx_epi32(sum, w, x)
#define FOLD4(sum) (sum)
/* The instruction wants unsigned weights: q + 128, and so a zero of 128, in sixteenths. */
#define DOT8(sum, w, x) _mm256_dpbusd_avx_epi32(sum, _mm256_xor_si256(w, _mm256_set1_epi8(-128)), x)
#define ZERO8 2048
#include "avx.h"
#include "tile.h"
#else
#define KNOWS_AVXVNNI 0
#endif

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vnni")))
#define NAME(x) avx512vnni_##x
#include "avx512.h"
#include "tile.h"

#if defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10
#define KNOWS_AVX512BF16 1
#ifndef AS_BFLOATS
#define AS_BFLOATS(v) ((__m512bh)(v))
#endif
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vnni,avx512bf16")))
#define NAME(x) avx512bf16_##x
#define DOT_BFLOATS(sum, w, x) _mm512_dpbf16_ps(sum, AS_BFLOATS(w), AS_BFLOATS(x))
#include "avx512.h"
#include "tile.h"
#else
#define KNOWS_AVX512BF16 0
#endif

#elif defined(__aarch64__)

INLINE float32x4_t four_unsigned(const uint8_t *p)
{
    uint8_t bytes[8] = {p[0], p[1], p[2], p[3]};
    return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vld1_u8(bytes)))));
}

INLINE float32x4_t no_floats(void) { return vdupq_n_f32(0); }
INLINE int32x4_t no_ints(void) { return vdupq_n_s32(0); }

#if defined(__clang__)
#define TARGET __attribute__((target("dotprod")))
#else
#define TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#endif
#define NAME(x) neon_##x
#define LANES 4
#define AT_ONCE 4
#define FOLLOWS_A_STREAM 0
#define INT int32x4_t
#define FLOAT float32x4_t
#define INT_ZERO no_ints
#define FLOAT_ZERO no_floats
#define FLOAT_SET vdupq_n_f32
#define LOAD(p) vreinterpretq_s32_u8(vld1q_u8((const uint8_t *)(p)))
#define LOAD_FLOATS vld1q_f32
#define STORE vst1q_f32
#define LOW_BFLOATS(v) vreinterpretq_f32_s32(vshlq_n_s32(v, 16))
#define HIGH_BFLOATS(v) vreinterpretq_f32_s32(vandq_s32(v, vdupq_n_s32((int32_t)0xffff0000)))
#define BROADCAST(p) vreinterpretq_s32_s8(vreinterpretq_s8_s32(vld1q_dup_s32((const int32_t *)(p))))
#define LOW_NIBBLES(v) vandq_s32(v, vdupq_n_s32(0x0f0f0f0f))
#define HIGH_NIBBLES(v) vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(v), 4))
#define DOT4(sum, w, x) vdotq_s32(sum, vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(x))
#define FOLD4(sum) (sum)
#define DOT8 DOT4
#define ZERO8 0
#define BYTES four_unsigned
#define TO_FLOAT vcvtq_f32_s32
#define TIMES vmulq_f32
#define PLUS vaddq_f32
#define PLUS_PRODUCT(sum, x, y) vfmaq_f32(sum, x, y)
#define MINUS_PRODUCT(sum, x, y) vfmsq_f32(sum, x, y)
#include "tile.h"

#endif

/* Which of them this CPU has, best first. */

static const struct named_set {
    const char *name;
    const struct instruction_set *set;
} SETS[] = {
#if defined(__x86_64__)
#if KNOWS_AVX512BF16
    {"avx512bf16", &avx512bf16_set},
#endif
    {"avx512vnni", &avx512vnni_set},
#if KNOWS_AVXVNNI
    {"avxvnni", &avxvnni_set},
#endif
    {"avx2", &avx2_set},
#elif defined(__aarch64__)
    {"neon", &neon_set},
#endif
};
enum { N_SETS = sizeof SETS / sizeof *SETS };

static int has(const char *name)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int vnni = avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni");
#if KNOWS_AVX512BF16
    if (!strcmp(name, "avx512bf16"))
        return vnni && __builtin_cpu_supports("avx512bf16");
#endif
    if (!strcmp(name, "avx512vnni"))
        return vnni;
#if KNOWS_AVXVNNI
    if (!strcmp(name, "avxvnni"))
        return avx2 && __builtin_cpu_supports("avxvnni");
#endif
    return avx2;
#elif defined(__aarch64__) && defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
    return 1; /* every Mac with an ARM processor */
#endif
}

static const struct instruction_set *used;

/* The name of instruction set number `i` that this CPU has, best first; null after the last. */
EXPORT const char *cake_set_name(int i)
{
    for (int s = 0; s < N_SETS; s++)
        if (has(SETS[s].name) && i-- == 0)
            return SETS[s].name;
    return NULL;
}

/* Compute with this set from now on; whether it is here. */
EXPORT int cake_use(const char *name)
{
    for (int s = 0; s < N_SETS; s++)
        if (!strcmp(SETS[s].name, name) && has(name)) {
            used = SETS[s].set;
            return 1;
        }
    return 0;
}
