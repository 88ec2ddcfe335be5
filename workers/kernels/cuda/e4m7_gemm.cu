// y = x W^T on Hopper, for weights of 12 bits: e4m7.py has their format, e4m7_gemm.py says how it is cut up.
//
// Compile-time, besides what hopper_tiles.cu asks for: AHEAD (1 or 4), steps of 16 columns whose weights a warpgroup has
// in registers: 1 where the sums leave no room for more.  The other warpgroups multiply while it unpacks then.

constexpr int STEPS = COLUMNS / 16;

static_assert(AHEAD == 1 || AHEAD == STEPS, "one step, or all of a stage");

// Past the end the last outputs come again: results of these are not written.
__device__ __forceinline__ void copy_weights(u32 to, const unsigned char* from, u32 barrier, int round, int rounds, int blocks) {
    const u64 policy = policy_of_weights();
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
        const int block = min(static_cast<int>(blockIdx.y) * GROUPS + group, blocks - 1);
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
            ::"r"(to + group * BLOCK_BYTES), "l"(from + (static_cast<long long>(block) * rounds + round) * BLOCK_BYTES),
            "n"(BLOCK_BYTES), "r"(barrier), "l"(policy) : "memory");
    }
}

// A thread's eight weights of a step, two for each register of wgmma's.
struct Eight {
    u32 low[2];  // Of the first four, and of the others.
    u32 high;    // Of all.
};

__device__ __forceinline__ Eight load(u32 block, int step) {
    const u32 thread = threadIdx.x % 128;
    Eight w;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(w.low[0]), "=r"(w.low[1]) : "r"(block + step * 1024 + thread * 8));
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(w.high) : "r"(block + STEPS * 1024 + step * 512 + thread * 4));
    return w;
}

// To bfloat16, 2^112 times too small.
__device__ __forceinline__ void unpack(u32 (&a)[4], const Eight& w) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const u32 high = __funnelshift_r(w.high, w.high, 4 * i) & 0x87878787;
        a[2 * i] = __byte_perm(w.low[i], high, 0x5140);
        a[2 * i + 1] = __byte_perm(w.low[i], high, 0x7362);
    }
}

__device__ __forceinline__ void multiply_step(Sums& sums, const u32 (&a)[4], u64 inputs) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int part = 0; part < PARTS; ++part) multiply(sums[part], a, inputs + part * (PART * 8));
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

#if AHEAD == 1
__device__ __forceinline__ void multiply_all(Sums& sums, const Rings& at, int count) {
    const u32 mine = at.weights + threadIdx.x / 128 * BLOCK_BYTES;
    Place<WEIGHT_STAGES> weights_at;
    Place<INPUT_STAGES> inputs_at;
    for (int round = 0; round < count; ++round) {
        const u64 b = descriptor(at.inputs + inputs_at.stage * INPUT_BYTES);
        await(at.weights_full + weights_at.stage * 8, weights_at.parity);
#pragma unroll 1
        for (int i = 0; i < STEPS; ++i) {
            const Eight w = load(mine + weights_at.stage * WEIGHT_BYTES, i);
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
            u32 a[4];
            unpack(a, w);
            if (i == 0) await(at.inputs_full + inputs_at.stage * 8, inputs_at.parity);
            multiply_step(sums, a, b + i * 2);
        }
        release(at.weights_empty + weights_at.stage * 8);
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        release(at.inputs_empty + inputs_at.stage * 8);
        weights_at.next(), inputs_at.next();
    }
}
#else
__device__ __forceinline__ void multiply_all(Sums& sums, const Rings& at, int count) {
    const u32 mine = at.weights + threadIdx.x / 128 * BLOCK_BYTES;
    Place<WEIGHT_STAGES> weights_at;
    Place<INPUT_STAGES> inputs_at;
    u32 inputs_before = 0, a[STEPS][4];
    for (int round = 0; round < count; ++round) {
        const u64 b = descriptor(at.inputs + inputs_at.stage * INPUT_BYTES);
        await(at.weights_full + weights_at.stage * 8, weights_at.parity);
        Eight w[STEPS];
#pragma unroll
        for (int i = 0; i < STEPS; ++i) w[i] = load(mine + weights_at.stage * WEIGHT_BYTES, i);
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
            // The same step of the round before is done with its registers.
            asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(STEPS - 1) : "memory");
            if (i == STEPS - 1 && round) release(at.inputs_empty + inputs_before * 8);
            unpack(a[i], w[i]);
            if (i == 0) await(at.inputs_full + inputs_at.stage * 8, inputs_at.parity);
            multiply_step(sums, a[i], b + i * 2);
        }
        // Not before all lanes have what they read: an arrival overtakes a load that is on its way.
        __syncwarp();
        release(at.weights_empty + weights_at.stage * 8);
        inputs_before = inputs_at.stage;
        weights_at.next(), inputs_at.next();
    }
}
#endif

// weights [blocks][round][BLOCK_BYTES]; inputs: boxes of 64 columns and ROWS rows.  y [rows, width]; scales, bias: of
// W's rows, the latter may be null.
extern "C" __global__ void __launch_bounds__(THREADS + 128, 1)
    e4m7_gemm(const unsigned char* weights, const __grid_constant__ TensorMap inputs, Result* y, const float* scales,
              const u16* bias, int rows, int width, int columns, int blocks) {
    const int rounds = columns / COLUMNS;
    run([&](u32 to, u32 barrier, int round) { copy_weights(to, weights, barrier, round, rounds, blocks); }, inputs,
        multiply_all, y, Outputs{scales, bias}, rows, width, columns);
}
