// y = x W^T on Hopper, for weights of bfloat16: hopper_gemm.py says what it is for and how it is cut up.

__device__ __forceinline__ void copy_weights(u32 to, const TensorMap& from, u32 barrier, int column) {
    const u64 policy = policy_of_weights();
    const int tile = blockIdx.y;
#if GATE
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4, %4, %5}], [%2], %6;"
        ::"r"(to), "l"(&from), "r"(barrier), "r"(column), "r"(0), "r"(tile * (OUTPUTS / 16)), "l"(policy) : "memory");
#else
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4}], [%2], %5;"
        ::"r"(to), "l"(&from), "r"(barrier), "r"(column), "r"(tile * OUTPUTS), "l"(policy) : "memory");
#endif
}

__device__ __forceinline__ void multiply_all(Sums& sums, const Rings& at, int count) {
    Place<WEIGHT_STAGES> weights_at;
    Place<INPUT_STAGES> inputs_at;
    u32 weights_before = 0, inputs_before = 0;
    for (int round = 0; round < count; ++round) {
        const u64 a = descriptor(at.weights + weights_at.stage * WEIGHT_BYTES + threadIdx.x / 128 * 64 * 128);
        const u64 b = descriptor(at.inputs + inputs_at.stage * INPUT_BYTES);
        await(at.inputs_full + inputs_at.stage * 8, inputs_at.parity);
        await(at.weights_full + weights_at.stage * 8, weights_at.parity);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int i = 0; i < COLUMNS / 16; ++i) {
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                multiply(sums[part], a + i * 2, b + i * 2 + part * (PART * 8));
            }
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        if (round) {
            asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
            release(at.weights_empty + weights_before * 8), release(at.inputs_empty + inputs_before * 8);
        }
        weights_before = weights_at.stage, inputs_before = inputs_at.stage;
        weights_at.next(), inputs_at.next();
    }
}

// weights: boxes of 64 columns and OUTPUTS rows; with a gate, of eight rows of the first half and eight of the
// second in turns.  inputs: of 64 columns and ROWS rows.  y [rows, width]; bias: of W's rows, or null.
extern "C" __global__ void __launch_bounds__(THREADS + 128, 1)
    hopper_gemm(const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap inputs, Result* y,
                const u16* bias, int rows, int width, int columns) {
    run([&](u32 to, u32 barrier, int round) { copy_weights(to, weights, barrier, round * COLUMNS); }, inputs,
        multiply_all, y, Outputs{nullptr, bias}, rows, width, columns);
}
