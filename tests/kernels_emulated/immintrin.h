/* Stands before the compiler's header of this name (-I), so that matrix.c computes with SIMDe's portable
   C instead of with instructions: every x86 variant then runs on every x86-64. */

#ifndef CAKE_EMULATED_IMMINTRIN_H
#define CAKE_EMULATED_IMMINTRIN_H

#define SIMDE_NO_NATIVE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>
#include <simde/x86/fma.h>

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

/* Every emulated instruction is here, and the compiler must emit none itself, which it would in a
   function with a target attribute. */
#define __builtin_cpu_init() ((void)0)
#define __builtin_cpu_supports(name) 1
#define target(...)

#endif
