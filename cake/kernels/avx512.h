/* What every instruction set with vectors of 512 bits and sums of products of bytes (VNNI) has in common.
   Included by sets.h before tile.h. */

#define AT_ONCE 8
#define FOLLOWS_A_STREAM 1
#define LANES 16
#define INT __m512i
#define FLOAT __m512
#define INT_ZERO _mm512_setzero_si512
#define FLOAT_ZERO _mm512_setzero_ps
#define FLOAT_SET _mm512_set1_ps
#define LOAD(p) _mm512_loadu_si512(p)
#define LOAD_FLOATS _mm512_loadu_ps
#define STORE _mm512_storeu_ps
#define LOW_BFLOATS(v) _mm512_castsi512_ps(_mm512_slli_epi32(v, 16))
#define HIGH_BFLOATS(v) _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32((int32_t)0xffff0000)))
#define BROADCAST(p) _mm512_set1_epi32(four_bytes(p))
#define LOW_NIBBLES(v) _mm512_and_si512(v, _mm512_set1_epi8(15))
#define HIGH_NIBBLES(v) _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15))
#define DOT4(sum, w, x) _mm512_dpbusd_epi32(sum, w, x)
#define FOLD4(sum) (sum)
#define DOT8(sum, w, x) _mm512_dpbusd_epi32(sum, _mm512_xor_si512(w, _mm512_set1_epi8(-128)), x)
#define ZERO8 2048
#define BYTES(p) _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(p))))
#define TO_FLOAT _mm512_cvtepi32_ps
#define TIMES _mm512_mul_ps
#define PLUS _mm512_add_ps
#define PLUS_PRODUCT(sum, x, y) _mm512_fmadd_ps(x, y, sum)
#define MINUS_PRODUCT(sum, x, y) _mm512_fnmadd_ps(x, y, sum)
