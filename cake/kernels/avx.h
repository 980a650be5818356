/* What every instruction set with vectors of 256 bits has in common. Included by sets.h before tile.h. */

#define AT_ONCE 4
#define FOLLOWS_A_STREAM 0
#define LANES 8
#define INT __m256i
#define FLOAT __m256
#define INT_ZERO _mm256_setzero_si256
#define FLOAT_ZERO _mm256_setzero_ps
#define FLOAT_SET _mm256_set1_ps
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define LOAD_FLOATS _mm256_loadu_ps
#define STORE _mm256_storeu_ps
#define LOW_BFLOATS(v) _mm256_castsi256_ps(_mm256_slli_epi32(v, 16))
#define HIGH_BFLOATS(v) _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32((int32_t)0xffff0000)))
#define BROADCAST(p) _mm256_set1_epi32(four_bytes(p))
#define LOW_NIBBLES(v) _mm256_and_si256(v, _mm256_set1_epi8(15))
#define HIGH_NIBBLES(v) _mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15))
#define BYTES(p) _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p))))
#define TO_FLOAT _mm256_cvtepi32_ps
#define TIMES _mm256_mul_ps
#define PLUS _mm256_add_ps
#define PLUS_PRODUCT(sum, x, y) _mm256_fmadd_ps(x, y, sum)
#define MINUS_PRODUCT(sum, x, y) _mm256_fnmadd_ps(x, y, sum)
