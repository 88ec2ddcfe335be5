// What the GEMMs on Hopper have in common: hopper_gemm.cu and e4m7_gemm.cu stand behind this text.
//
// Compile-time: ROWS (of a tile) in PARTS of one instruction each, GROUPS (warpgroups that multiply, 64 outputs
// each), BLOCK_BYTES (64 outputs' weights of a stage), WEIGHT_STAGES, INPUT_STAGES, SPLITS (programs that share k: a
// cluster), GATE (0 none, 1 SiLU, 2 GELU), WIDE (results are float32), MULTIPLYING_REGISTERS, COPYING_REGISTERS (0: as
// at the start); and, before this text, multiply(float* sum, weights, u64 inputs): one wgmma of 64 outputs x
// ROWS / PARTS rows x 16 of k.
//
// Two warps of the last warpgroup copy tiles of weights and tiles of x, each into a ring of stages of its own; the
// other warpgroups multiply them.

struct alignas(64) TensorMap { u64 opaque[16]; };

constexpr int OUTPUTS = 64 * GROUPS;
constexpr int COLUMNS = 64;  // Of k in a stage: the 128 bytes that the swizzle knows.
constexpr int WEIGHT_BYTES = GROUPS * BLOCK_BYTES, INPUT_BYTES = ROWS * 128;  // Of a stage.
constexpr int STAGES_BYTES = WEIGHT_STAGES * WEIGHT_BYTES + INPUT_STAGES * INPUT_BYTES;
constexpr int THREADS = 128 * GROUPS;  // That multiply.
constexpr int WIDTH = GATE ? OUTPUTS / 2 : OUTPUTS;  // What of a row a program writes.
constexpr bool SUMS = SPLITS > 1 || ROWS < 32 || WIDE;  // Go to shared memory, and not results in bfloat16.
// Between two rows of results, or of sums: no two lanes of a store in one bank.
constexpr int LINE_BYTES = SUMS ? (OUTPUTS + 4) * 4 : (WIDTH + 8) * 2;

#if WIDE
typedef float Result;
#else
typedef u16 Result;
#endif

static_assert(ROWS * LINE_BYTES <= STAGES_BYTES, "results lie where the stages were");

// ---------------------------------------------------------------- stages
__device__ __forceinline__ void init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// A warp is done with a stage.
__device__ __forceinline__ void release(u32 barrier) {
    if (threadIdx.x % 32 == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void await(u32 barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(barrier), "r"(parity) : "memory");
}

__device__ __forceinline__ void copy_inputs(u32 to, const TensorMap& from, u32 barrier, int column) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
        ::"r"(to), "l"(&from), "r"(barrier), "r"(column), "r"(blockIdx.x * ROWS) : "memory");
}

// Weights that one program reads are the first to leave the L2 cache.
__device__ __forceinline__ u64 policy_of_weights() {
    constexpr u64 evict_first = 0x12F0000000000000ull, evict_normal = 0x1000000000000000ull;
    return gridDim.x == 1 ? evict_first : evict_normal;
}

// Of rows of 128 swizzled bytes along k; eight of them are 1,024 bytes.
__device__ __forceinline__ u64 descriptor(u32 address) {
    return (static_cast<u64>(address & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

// Where in a ring of stages a round is, and which of its visits to that place.
template <int STAGES>
struct Place {
    u32 stage = 0, parity = 0;
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// One thread has all of `count` rounds copied, each as soon as there is a stage for it.
template <int STAGES, typename Copy>
__device__ __forceinline__ void keep_full(u32 full, u32 empty, u32 bytes, int count, const Copy& copy) {
    Place<STAGES> at;
    for (int round = 0; round < count; ++round, at.next()) {
        if (round >= STAGES) await(empty + at.stage * 8, at.parity ^ 1);
        expect(full + at.stage * 8, bytes);
        copy(at.stage, full + at.stage * 8, round);
    }
}

// ---------------------------------------------------------------- results
__device__ __forceinline__ float bf16(u16 value) { return __uint_as_float(static_cast<u32>(value) << 16); }

// As in activation.py; the reciprocal is within one unit in the last place, far below bfloat16's.
__device__ __forceinline__ float gated(float gate, float up) {
    const float t = GATE == 2 ? gate * (1.5957691216f + 0.0713548163f * gate * gate) : gate;
    float share;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(share) : "f"(1.0f + __expf(-t)));
    return gate * share * up;
}

// Of one thread, for each eight rows: those of two of them (lane % 4 * 2 and the next) and of output lane / 4,
// then the same of output lane / 4 + 8.  With a gate these are the gate and what it lets through.
constexpr int PART = ROWS / PARTS;
typedef float Sums[PARTS][PART / 2];

// To the compiler, what wgmma is still writing is a register like any other.  A zero that it knows of, or a reader that
// it moves up, would make ptxas let each instruction wait for the one before it (its warning C7515).
__device__ __forceinline__ void clear(Sums& sums) {
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
#pragma unroll
        for (int i = 0; i < PART / 2; ++i) asm volatile("mov.f32 %0, 0f00000000;" : "=f"(sums[part][i]));
    }
}

__device__ __forceinline__ void settle(Sums& sums) {
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
#pragma unroll
        for (int i = 0; i < PART / 2; ++i) asm volatile("" : "+f"(sums[part][i])::"memory");
    }
}

__device__ __forceinline__ const float* of_eight_rows(const Sums& sums, int i) {
    return sums[i / (PART / 8)] + i % (PART / 8) * 4;
}

// What the sums of an output are multiplied by, and what is added: of W's rows, or null for none.
struct Outputs {
    const float* scales;
    const u16* biases;
    __device__ __forceinline__ float scale(int output) const { return scales ? scales[output] : 1.0f; }
    __device__ __forceinline__ float bias(int output) const { return biases ? bf16(biases[output]) : 0.0f; }
};

// Results as [row][output] in bfloat16: matrices of eight rows and eight outputs, four at a time, transposed.
__device__ __forceinline__ void leave_results(u32 to, const Sums& sums, const Outputs& outputs, int first_output, int width) {
    constexpr int AT_ONCE = GATE ? 4 : 2;  // Of eight rows each.
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int output = first_output + warp * (GATE ? 8 : 16) + lane / 4, other = output + (GATE ? width : 8);
    const bool there = output < width;
    const float scale = there ? outputs.scale(output) : 0.0f, scale_other = there ? outputs.scale(other) : 0.0f;
    const float add = there ? outputs.bias(output) : 0.0f, add_other = there ? outputs.bias(other) : 0.0f;
    u32 at = to + ((GATE ? lane / 8 : lane / 16) * 8 + lane % 8) * LINE_BYTES + warp * (GATE ? 16 : 32) +
             (GATE ? 0 : lane / 8 % 2 * 16);
#pragma unroll
    for (int i = 0; i < ROWS / 8; i += AT_ONCE, at += AT_ONCE * 8 * LINE_BYTES) {
        u32 m[4];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            const float* sum = of_eight_rows(sums, i + j);
            const float a = sum[0] * scale + add, b = sum[1] * scale + add;
            const float c = sum[2] * scale_other + add_other, d = sum[3] * scale_other + add_other;
            if (GATE) {
                m[j] = bfloat16s(gated(a, c), gated(b, d));
            } else {
                m[2 * j] = bfloat16s(a, b), m[2 * j + 1] = bfloat16s(c, d);
            }
        }
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                     ::"r"(at), "r"(m[0]), "r"(m[1]), "r"(m[2]), "r"(m[3]) : "memory");
    }
}

__device__ __forceinline__ void write_results(u32 from, u16* y, int rows, int first_output, int width) {
    constexpr int UNITS = WIDTH / 8;
#pragma unroll 4
    for (int i = threadIdx.x; i < rows * UNITS; i += THREADS) {
        const int row = i / UNITS, output = first_output + i % UNITS * 8;
        if (output >= width) continue;
        uint4 v;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from + row * LINE_BYTES + i % UNITS * 16));
        *reinterpret_cast<uint4*>(y + static_cast<long long>(row) * width + output) = v;
    }
}

// ---------------------------------------------------------------- sums, also of programs that share k
// As [row][output].
__device__ __forceinline__ void leave_sums(u32 to, const Sums& sums) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 at = to + lane % 4 * 2 * LINE_BYTES + (warp * 16 + lane / 4) * 4;
#pragma unroll
    for (int i = 0; i < ROWS / 8; ++i) {
        const float* sum = of_eight_rows(sums, i);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const u32 place = at + (8 * i + j % 2) * LINE_BYTES + j / 2 * 32;
            asm volatile("st.shared.f32 [%0], %1;" ::"r"(place), "f"(sum[j]) : "memory");
        }
    }
}

// In the order of k.
__device__ __forceinline__ float4 total(u32 address) {
    float4 all = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int split = 0; split < SPLITS; ++split) {
        u32 there = address;
        if (SPLITS > 1) asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(split));
        float4 v;
        asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(there));
        all.x += v.x, all.y += v.y, all.z += v.z, all.w += v.w;
    }
    return all;
}

__device__ __forceinline__ void finish(float4& v, const Outputs& outputs, int output) {
    v.x = v.x * outputs.scale(output) + outputs.bias(output);
    v.y = v.y * outputs.scale(output + 1) + outputs.bias(output + 1);
    v.z = v.z * outputs.scale(output + 2) + outputs.bias(output + 2);
    v.w = v.w * outputs.scale(output + 3) + outputs.bias(output + 3);
}

// Each of these programs writes a part of the rows.
__device__ __forceinline__ void write_sums(u32 from, Result* y, const Outputs& outputs, int rows, int first_output,
                                           int width) {
    constexpr int UNITS = WIDTH / 4, MINE = (ROWS + SPLITS - 1) / SPLITS;
    const int before = blockIdx.z * MINE, count = min(MINE, rows - before) * UNITS;
#pragma unroll 4
    for (int i = threadIdx.x; i < count; i += THREADS) {
        const int row = before + i / UNITS, place = i % UNITS * 4, output = first_output + place;
        if (output >= width) continue;
        const u32 at = from + row * LINE_BYTES + (GATE ? place / 8 * 16 + place % 8 : place) * 4;
        float4 v = total(at);
        finish(v, outputs, output);
        if (GATE) {
            float4 up = total(at + 32);
            finish(up, outputs, width + output);
            v = make_float4(gated(v.x, up.x), gated(v.y, up.y), gated(v.z, up.z), gated(v.w, up.w));
        }
        Result* to = y + static_cast<long long>(row) * width + output;
        if (WIDE) {
            *reinterpret_cast<float4*>(to) = v;
        } else {
            *reinterpret_cast<uint2*>(to) = make_uint2(bfloat16s(v.x, v.y), bfloat16s(v.z, v.w));
        }
    }
}

// What the programs that share k wrote to shared memory is to be seen.
__device__ __forceinline__ void meet() {
    if (SPLITS > 1) {
        asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
    } else {
        __syncthreads();
    }
}

// No program ends while others read its sums.
__device__ __forceinline__ void end_together() {
    if (SPLITS > 1) {
        asm volatile("barrier.cluster.arrive.relaxed.aligned;\n barrier.cluster.wait.aligned;" ::: "memory");
    }
}

// ---------------------------------------------------------------- the program
// Addresses in shared memory: of the stages, and of their barriers.
struct Rings {
    u32 weights, inputs, weights_full, weights_empty, inputs_full, inputs_empty;
};

// copy_weights(address, barrier, round of k); multiply_all(sums, rings, count of rounds).
// y [rows, width], where a program's tile begins.
template <typename CopyWeights, typename MultiplyAll>
__device__ __forceinline__ void run(const CopyWeights& copy_weights, const TensorMap& inputs,
                                    const MultiplyAll& multiply_all, Result* y, const Outputs& outputs, int rows,
                                    int width, int columns) {
    extern __shared__ unsigned char memory[];
    const u32 stages = (static_cast<u32>(__cvta_generic_to_shared(memory)) + 1023) & ~1023u;
    Rings at;
    at.weights = stages, at.inputs = stages + WEIGHT_STAGES * WEIGHT_BYTES;
    at.weights_full = stages + STAGES_BYTES, at.weights_empty = at.weights_full + WEIGHT_STAGES * 8;
    at.inputs_full = at.weights_empty + WEIGHT_STAGES * 8, at.inputs_empty = at.inputs_full + INPUT_STAGES * 8;
    const int rounds = columns / COLUMNS;
    const int begin = rounds * blockIdx.z / SPLITS, count = rounds * (blockIdx.z + 1) / SPLITS - begin;

    let_the_next_come_up();
    if (threadIdx.x == 0) {
        for (int i = 0; i < WEIGHT_STAGES; ++i) init(at.weights_full + i * 8, 1), init(at.weights_empty + i * 8, 4 * GROUPS);
        for (int i = 0; i < INPUT_STAGES; ++i) init(at.inputs_full + i * 8, 1), init(at.inputs_empty + i * 8, 4 * GROUPS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    if (threadIdx.x >= THREADS) {
#if COPYING_REGISTERS
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COPYING_REGISTERS));
#endif
        if (threadIdx.x == THREADS) {
            // No kernel writes weights: they can be under way before those before have ended.
            keep_full<WEIGHT_STAGES>(at.weights_full, at.weights_empty, WEIGHT_BYTES, count, [&](u32 stage, u32 barrier, int round) {
                copy_weights(at.weights + stage * WEIGHT_BYTES, barrier, begin + round);
            });
        } else if (threadIdx.x == THREADS + 32) {
            wait_for_kernels_before();
            keep_full<INPUT_STAGES>(at.inputs_full, at.inputs_empty, INPUT_BYTES, count, [&](u32 stage, u32 barrier, int round) {
                copy_inputs(at.inputs + stage * INPUT_BYTES, inputs, barrier, (begin + round) * COLUMNS);
            });
        }
        __syncwarp();  // Barriers below are of whole warps.
    } else {
#if MULTIPLYING_REGISTERS
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MULTIPLYING_REGISTERS));
#endif
        Sums sums;
        clear(sums);
        multiply_all(sums, at, count);
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        settle(sums);

        // All warps are done with the stages before others use their place.
        asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
        if (SUMS) {
            leave_sums(stages, sums);
        } else {
            leave_results(stages, sums, outputs, blockIdx.y * WIDTH, width);
        }
    }

    meet();
    if (threadIdx.x < THREADS) {
        wait_for_kernels_before();
        y += static_cast<long long>(blockIdx.x) * ROWS * width;
        rows = min(rows - static_cast<int>(blockIdx.x) * ROWS, ROWS);
        if (SUMS) {
            write_sums(stages, y, outputs, rows, blockIdx.y * WIDTH, width);
        } else {
            write_results(stages, reinterpret_cast<u16*>(y), rows, blockIdx.y * WIDTH, width);
        }
    }
    end_together();
}
