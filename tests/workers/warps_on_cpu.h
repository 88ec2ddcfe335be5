// Runs a kernel of CUDA C++ on the CPU: a program's threads take turns and meet where its instructions make them meet.
// It stands before the kernel's text without what that has between "instructions" and the next heading (warp.cu), and has
// these instructions by their description in the PTX ISA.  One program at a time, in the order of the grid or against it, each
// with shared memory in which all bits are set, and which must be so behind what it asked for when it ends.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

using std::max;
using std::min;

struct Place { unsigned x, y, z; };
struct float4 { float x, y, z, w; };

static Place threadIdx, blockIdx, gridDim;
static float4 memory[1 << 13];  // Shared.

// ---------------------------------------------------------------- threads
static ucontext_t scheduler;
static const char* failure;  // Why the grid has ended, or null.
static int turns;  // Since a thread last got on.
static std::vector<ucontext_t> threads;
static std::vector<bool> runs;

static void pause() {
    const unsigned me = threadIdx.x;
    if (++turns > 100000) failure = "threads wait for one that does not come";
    swapcontext(&threads[me], &scheduler);
}

struct Meeting {
    int here = 0, times = 0;
    void meet(int all) {
        const int now = times;
        if (++here == all) here = 0, ++times;
        while (times == now) pause();
        turns = 0;
    }
};

static Meeting of_program, of_warps[32];
static unsigned shown[32][32][6];  // By warp and lane, what threads show each other.

static unsigned warp() { return threadIdx.x / 32; }
static unsigned lane() { return threadIdx.x % 32; }
static void __syncthreads() { of_program.meet(threads.size()); }

// Every lane shows `count` words, looks at all others', and goes on when all have.
template <typename Look>
static auto together(const unsigned* words, int count, const Look& look) {
    memcpy(shown[warp()][lane()], words, 4 * count);
    of_warps[warp()].meet(32);
    auto seen = look(shown[warp()]);
    of_warps[warp()].meet(32);
    return seen;
}

static bool __syncthreads_or(bool mine) {
    static bool any;
    __syncthreads();
    any = false;
    __syncthreads();
    any = any || mine;
    __syncthreads();
    return any;
}

// ---------------------------------------------------------------- instructions
static float as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
static unsigned as_bits(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
static float __uint_as_float(unsigned bits) { return as_float(bits); }
static unsigned __float_as_uint(float x) { return as_bits(x); }
static float __ldcg(const float* at) { return *at; }

static unsigned __byte_perm(unsigned a, unsigned b, unsigned picks) {
    const unsigned long long both = a | static_cast<unsigned long long>(b) << 32;
    unsigned made = 0;
    for (int i = 0; i < 4; ++i) made |= static_cast<unsigned>(both >> 8 * (picks >> 4 * i & 7) & 0xFF) << 8 * i;
    return made;
}

static float __shfl_xor_sync(unsigned, float x, unsigned other) {
    const unsigned mine = as_bits(x), from = lane() ^ other;
    return together(&mine, 1, [&](auto& all) { return as_float(all[from][0]); });
}

static bool __any_sync(unsigned, bool x) {
    const unsigned mine = x;
    return together(&mine, 1, [](auto& all) { return std::any_of(all, all + 32, [](auto& one) { return one[0]; }); });
}

template <int WORDS>
static void load(unsigned (&to)[WORDS], const unsigned char* from) {
    const unsigned long long at = reinterpret_cast<unsigned long long>(from);
    if (at % (4 * min(WORDS, 4))) failure = "misaligned";
    memcpy(to, from, 4 * WORDS);
}

static void store(unsigned short* to, const unsigned (&from)[4]) {
    if (reinterpret_cast<unsigned long long>(to) % 16) failure = "misaligned";
    memcpy(to, from, 16);
}

static float4 load_others(const float* from) { return *reinterpret_cast<const float4*>(from); }
static int count_up(int* counter) { return (*counter)++; }
static void let_the_next_come_up() {}
static void wait_for_kernels_before() {}

static float power_of_two(float x) {
    const float y = exp2f(x);
    return y < 0x1p-126f ? 0 : y;
}

static float half_of(unsigned pair, int which) { return as_float(which ? pair & 0xFFFF0000 : pair << 16); }

static unsigned rounded(float x) {
    const unsigned bits = as_bits(x);
    if (x != x) return 0x7FFF;
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

static unsigned bfloat16s(float first, float second) { return rounded(first) | rounded(second) << 16; }

// mma.m16n8k16: A's row and column, B's row and column, as lanes have them.
static void multiply(float (&sum)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    const unsigned mine[6] = {a0, a1, a2, a3, b0, b1};
    together(mine, 6, [&](auto& all) {
        const auto a = [&](int row, int k) { return half_of(all[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2); };
        const auto b = [&](int k, int column) { return half_of(all[column * 4 + k % 8 / 2][4 + k / 8], k % 2); };
        for (int i = 0; i < 4; ++i) {
            double total = sum[i];
            for (int k = 0; k < 16; ++k) {
                total += static_cast<double>(a(lane() / 4 + i / 2 * 8, k)) * b(k, lane() % 4 * 2 + i % 2);
            }
            sum[i] = total;
        }
        return 0;
    });
}

// movmatrix.m8n8.trans.
static unsigned transposed(unsigned pair) {
    return together(&pair, 1, [](auto& all) {
        unsigned made = 0;
        for (int i = 0; i < 2; ++i) {
            const unsigned row = lane() % 4 * 2 + i, column = lane() / 4, word = all[row * 4 + column / 2][0];
            made |= (word >> column % 2 * 16 & 0xFFFF) << 16 * i;
        }
        return made;
    });
}

// ---------------------------------------------------------------- a grid
static std::function<void()> kernel;
static std::vector<std::vector<char>> stacks;

static void run_thread() {
    kernel();
    runs[threadIdx.x] = false;
    pause();
}

static void run_program(unsigned count) {
    threads.resize(count), runs.assign(count, true), stacks.resize(count, std::vector<char>(1 << 17));
    for (unsigned i = 0; i < count; ++i) {
        getcontext(&threads[i]);
        threads[i].uc_stack.ss_sp = stacks[i].data(), threads[i].uc_stack.ss_size = stacks[i].size();
        makecontext(&threads[i], run_thread, 0);
    }
    while (!failure && std::any_of(runs.begin(), runs.end(), [](bool one) { return one; })) {
        for (unsigned i = 0; i < count; ++i) {
            threadIdx = {i, 0, 0};
            if (runs[i]) swapcontext(&scheduler, &threads[i]);
        }
    }
}

static const char* run_grid(Place grid, unsigned count, unsigned shared_bytes, bool last_first,
                            const std::function<void()>& what) {
    gridDim = grid, kernel = what, failure = nullptr, turns = 0;
    const unsigned programs = grid.x * grid.y * grid.z;
    const unsigned char* bytes = reinterpret_cast<unsigned char*>(memory);
    for (unsigned n = 0; n < programs && !failure; ++n) {
        const unsigned i = last_first ? programs - 1 - n : n;
        blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
        memset(memory, 0xFF, sizeof memory);
        of_program = {};
        for (auto& each : of_warps) each = {};
        run_program(count);
        if (std::any_of(bytes + shared_bytes, bytes + sizeof memory, [](unsigned char one) { return one != 0xFF; })) {
            failure = "wrote behind its shared memory";
        }
    }
    return failure;
}
