// Packs a weight of bfloat16 into 12 bits: e4m7.py has the format.  warp.cu stands in front of this text.
//
// Compile-time: OUTPUTS, COLUMNS (of a block: 64 and 64), THREADS (of a program), TOO_SMALL (e4m7.TOO_SMALL).
//
// A program has 64 outputs.  It looks for the largest exponent of each, eight threads an output; then 128 threads have a
// block of 64 columns, each of them what it is in wgmma's registers: two outputs, and of 16 columns two and two others.

// ---------------------------------------------------------------- sizes
constexpr int SHARERS = THREADS / OUTPUTS;  // Threads that look for an output's largest.
constexpr int OWNERS = 128;                 // Threads of a block.
constexpr int STEP = 16;                    // Columns that wgmma takes at once.
constexpr int LOW_BYTES = OUTPUTS * COLUMNS, BLOCK_BYTES = LOW_BYTES * 3 / 2;

constexpr int BIAS = 127, TOP = 15, MANTISSA_BITS = 7, SIGN = 11;
// Exponent of an output's largest, at the least: with 2^-95 all that is computed here is a normal number.
constexpr int LEAST = 32;

// ---------------------------------------------------------------- the format
__device__ __forceinline__ int exponent_of(u32 bits) { return bits >> MANTISSA_BITS & 255; }
__device__ __forceinline__ float two_to(int exponent) { return __uint_as_float(BIAS + exponent << 23); }

// Which output of the weight a packed one is: its two halves take turns of eight where it is gated.
__device__ __forceinline__ u64 place_of(int output, int n, int gated) {
    return gated ? output / 8 % 2 * (n / 2) + output / 16 * 8 + output % 8 : output;
}

// Sign, exponent of four bits and mantissa of a bfloat16, whose output's largest exponent is given.
__device__ __forceinline__ u32 twelve_bits(u32 bits, int largest) {
    const int exponent = exponent_of(bits) - largest + TOP;
    u32 number = exponent << MANTISSA_BITS | bits & 127;
    if (exponent <= 0) {
        // A whole number of what the last bit is worth, rounded by what a float of 2^23 has no bits for; 128 is right, too.
        const float parts = __uint_as_float((bits & 0x7FFF) << 16) * two_to(BIAS - 1 + TOP + MANTISSA_BITS - largest);
        number = __float_as_uint(parts + 0x1p23f) & 0xFF;
    }
    return number | (bits >> 15) << SIGN;
}

// What is stored of a number beside its low byte: the exponent's first three bits, and the sign in front.
__device__ __forceinline__ u32 four_bits(u32 number) { return number >> 8 & 7 | number >> SIGN << 7; }

// ---------------------------------------------------------------- the kernel
// grid (blocks of outputs).  weight [n, k]; blocks [n / 64, k / 64, BLOCK_BYTES]; scales [n], infinite where an output has a
// number that cannot be packed.  gated: 0 or 1.
extern "C" __global__ void __launch_bounds__(THREADS)
    e4m7_pack(const u16* weight, u8* blocks, float* scales, int n, int k, int gated) {
    extern __shared__ float4 memory[];
    float* largest = reinterpret_cast<float*>(memory);  // [OUTPUTS]
    wait_for_kernels_before();
    const int first = blockIdx.x * OUTPUTS;
    {
        const int mine = threadIdx.x / SHARERS, sharer = threadIdx.x % SHARERS, output = first + mine;
        float most = LEAST;
        if (output < n) {
            const u16* row = weight + place_of(output, n, gated) * k;
            for (int column = 8 * sharer; column < k; column += 8 * SHARERS) {
                u32 pairs[4];
                load(pairs, reinterpret_cast<const u8*>(row + column));
#pragma unroll
                for (int i = 0; i < 4; ++i) most = fmaxf(most, max(exponent_of(pairs[i]), exponent_of(pairs[i] >> 16)));
            }
        }
#pragma unroll
        for (int other = SHARERS / 2; other > 0; other /= 2) most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFF, most, other));
        if (sharer == 0) {
            largest[mine] = most;
            // The last is infinity's: what would be more, of 2^16 on, no float can have.
            const int exponent = min(static_cast<int>(most) - BIAS + TOO_SMALL, BIAS + 1);
            if (output < n) scales[place_of(output, n, gated)] = two_to(exponent);
        }
    }
    __syncthreads();

    const int owner = threadIdx.x % OWNERS, lane = owner % 32, line = owner / 32 * 16 + lane / 4;
    const u16* rows[2];
    int tops[2];
    bool is_there[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int output = first + line + 8 * i;
        is_there[i] = output < n, tops[i] = largest[line + 8 * i];
        rows[i] = weight + (is_there[i] ? place_of(output, n, gated) * k : 0) + lane % 4 * 2;
    }
    for (int block = threadIdx.x / OWNERS; block < k / COLUMNS; block += THREADS / OWNERS) {
        u8* to = blocks + (static_cast<u64>(blockIdx.x) * (k / COLUMNS) + block) * BLOCK_BYTES;
#pragma unroll
        for (int step = 0; step < COLUMNS / STEP; ++step) {
            u32 low[2] = {}, high = 0;
#pragma unroll
            for (int i = 0; i < 8; ++i) {  // Second half of the columns, second output, second of a pair.
                const int later = i / 4, below = i / 2 % 2, second = i % 2, byte = i % 4;
                const u16* from = rows[below] + block * COLUMNS + step * STEP + 8 * later + second;
                const u32 number = twelve_bits(is_there[below] ? *from : 0, tops[below]), rest = four_bits(number);
                low[later] |= (number & 255) << 8 * byte;
                // See e4m7.py: a later number's sign is in the next byte.
                high |= later ? (rest & 7) << 4 << 8 * byte | (rest >> 7) << 3 << 8 * ((byte + 1) % 4) : rest << 8 * byte;
            }
            const int place = step * OWNERS + owner;
            *reinterpret_cast<u64*>(to + 8 * place) = low[0] | static_cast<u64>(low[1]) << 32;
            *reinterpret_cast<u32*>(to + LOW_BYTES + 4 * place) = high;
        }
    }
}
