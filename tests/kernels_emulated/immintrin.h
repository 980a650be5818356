/* Stands before the compiler's header of this name (-I), so that matrix.c computes with SIMDe's portable
   C instead of with instructions: every x86 variant then runs on every x86-64. */

#ifndef CAKE_EMULATED_IMMINTRIN_H
#define CAKE_EMULATED_IMMINTRIN_H

#define SIMDE_NO_NATIVE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>
#include <simde/x86/fma.h>
#include <stdint.h>
#include <string.h>

#define IN_REGISTER(x) /* its vectors are structures, which have no register of their own */

/* What SIMDe, at least up to 0.7.4, does not have. */

#ifndef _mm256_dpbusd_avx_epi32
#define _mm256_dpbusd_avx_epi32 simde_mm256_dpbusd_epi32
#endif

#ifndef _mm512_cvtepu8_epi32
static inline simde__m512i emulated_cvtepu8_epi32(simde__m128i bytes)
{
    simde__m128i_private from = simde__m128i_to_private(bytes);
    simde__m512i_private to;
    for (int i = 0; i < 16; i++)
        to.i32[i] = from.u8[i];
    return simde__m512i_from_private(to);
}
#define _mm512_cvtepu8_epi32 emulated_cvtepu8_epi32
#endif

#ifndef _mm512_cvtepi32_ps
static inline simde__m512 emulated_cvtepi32_ps(simde__m512i numbers)
{
    simde__m512i_private from = simde__m512i_to_private(numbers);
    simde__m512_private to;
    for (int i = 0; i < 16; i++)
        to.f32[i] = (float)from.i32[i];
    return simde__m512_from_private(to);
}
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps
#endif

/* Pairs of bfloat16 as any other 512 bits: SIMDe has a type of their own that nothing else becomes. */
#undef _mm512_dpbf16_ps
static inline simde__m512 emulated_dpbf16_ps(simde__m512 sums, simde__m512i w, simde__m512i x)
{
    simde__m512_private to = simde__m512_to_private(sums);
    uint32_t pairs[2][16];
    memcpy(pairs[0], &w, sizeof w);
    memcpy(pairs[1], &x, sizeof x);
    for (int i = 0; i < 16; i++) {
        float even[2], odd[2];
        for (int side = 0; side < 2; side++) {
            const uint32_t low = pairs[side][i] << 16, high = pairs[side][i] & 0xffff0000;
            memcpy(&even[side], &low, sizeof low);
            memcpy(&odd[side], &high, sizeof high);
        }
        to.f32[i] += odd[0] * odd[1];
        to.f32[i] += even[0] * even[1];
    }
    return simde__m512_from_private(to);
}
#define _mm512_dpbf16_ps emulated_dpbf16_ps
#define AS_BFLOATS(v) (v)

/* Every emulated instruction is here, and the compiler must emit none itself, which it would in a
   function with a target attribute. */
#define __builtin_cpu_init() ((void)0)
#define __builtin_cpu_supports(name) 1
#define target(...)

#endif
