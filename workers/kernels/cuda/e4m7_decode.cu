// Attention of decodes over a cache of 12 bits: e4m7_cache.py has its format, e4m7_decode.py says how it is cut up.
// warp.cu stands in front of this text.
//
// Compile-time: HEAD_DIM (64, 128 or 256), KV_HEADS, BLOCK_SIZE (a multiple of 16), WARPS (of a program), PROGRAMS (that a
// multiprocessor has to have room for), STEP (a program's keys are a multiple of it).
//
// A warp takes rounds of 16 keys.  In mma.m16n8k16 these, then columns of their values, are the 16 rows, and query heads
// the 8 columns: so its registers of A come from memory as they are, each thread unpacks what it has read, and the next
// round's keys and values are on their way meanwhile.  Which of a head's numbers is which column of A does not matter
// for a sum over all of them, nor which row of values: a thread has neighbours in memory.

// ---------------------------------------------------------------- sizes
constexpr int ROUND = 16;  // Keys.
constexpr int HEADS = 8;   // Query heads of a program, of one KV head.
constexpr int THREADS = 32 * WARPS;
constexpr int HALF = HEAD_DIM / 2;
constexpr int KEY_WORDS = HALF / 16;    // Of four bytes: a thread has a quarter of a half key.
constexpr int VALUE_WORDS = HALF / 32;  // An eighth of a half value.
constexpr int TILES = HEAD_DIM / 16;    // Of sums, 16 columns each.
constexpr int LINE = HEAD_DIM + 8;      // Between two heads' sums in shared memory.

// Powers of two: what is unpacked is 2^112 times too small (e4m7.TOO_SMALL), and products of that would be zero.
constexpr float QUERY_FACTOR = 0x1p64f, SCORE_FACTOR = 0x1p48f, WEIGHT_FACTOR = 0x1p48f, SUM_FACTOR = 0x1p64f;
constexpr float LOWEST = -1e30f;
#define NOTHING __uint_as_float(0xFF800000)  // -infinity; there are no headers.
// Sums are only made smaller when a score is so much above the largest before (in powers of two): weights go up to 256.
constexpr float SLACK = 8;

static_assert(BLOCK_SIZE % ROUND == 0, "a round is of one block");

// ---------------------------------------------------------------- the format
// High bytes: of the first half's numbers, and the second's.
__device__ __forceinline__ u32 first_of(u32 both) { return both & 0x87878787; }
__device__ __forceinline__ u32 second_of(u32 both) { return (both >> 4 & 0x07070707) | (both << 4 & 0x80808080); }

// Of bytes a and b in turns: of those of index 0 and 1, and of 2 and 3.
__device__ __forceinline__ u32 front(u32 a, u32 b) { return __byte_perm(a, b, 0x5140); }
__device__ __forceinline__ u32 back(u32 a, u32 b) { return __byte_perm(a, b, 0x7362); }

__device__ __forceinline__ float power_of_key(u32 powers) { return __uint_as_float(powers << 16); }
__device__ __forceinline__ float power_of_value(u32 powers) { return __uint_as_float(powers & 0xFFFF0000); }

// ---------------------------------------------------------------- a round
// A thread's number in its group of four, and the group's.
__device__ __forceinline__ int member() { return threadIdx.x % 4; }
__device__ __forceinline__ int group() { return threadIdx.x % 32 / 4; }

struct Keys {  // Tokens group() and group() + 8, a quarter of each.
    u32 first[2][KEY_WORDS], second[2][KEY_WORDS], high[2][KEY_WORDS];
};

struct Values {  // Tokens 2 member() and the next, and 8 further, an eighth of each.
    u32 first[4][VALUE_WORDS], second[4][VALUE_WORDS], high[4][VALUE_WORDS];
};

// Where the cache's blocks have a KV head's, and where a thread's are in it.
struct Places {
    static constexpr u32 LOW_BYTES = KV_HEADS * BLOCK_SIZE * HEAD_DIM, KEY_BYTES = LOW_BYTES * 3 / 2;
    static constexpr u32 BLOCK_BYTES = 2 * KEY_BYTES + KV_HEADS * BLOCK_SIZE * 4;
    const u8* cache;
    u32 key, key_high, value, value_high, powers;  // In a block.

    __device__ __forceinline__ Places(const u8* cache, int kv_head) : cache(cache) {
        const u32 low = kv_head * (BLOCK_SIZE * HEAD_DIM), high = LOW_BYTES + kv_head * (BLOCK_SIZE * HALF);
        key = low + group() * HEAD_DIM + member() * 4 * KEY_WORDS;
        key_high = high + group() * HALF + member() * 4 * KEY_WORDS;
        value = low + KEY_BYTES + 2 * member() * HEAD_DIM + group() * 4 * VALUE_WORDS;
        value_high = high + KEY_BYTES + 2 * member() * HALF + group() * 4 * VALUE_WORDS;
        powers = 2 * KEY_BYTES + (kv_head * BLOCK_SIZE + group()) * 4;
    }

    // token: of the block, a round's first.
    __device__ __forceinline__ void load_keys(Keys& to, u32 block, u32 token) const {
        const u8* at = cache + static_cast<u64>(block) * BLOCK_BYTES;
        const u8 *lows = at + (key + token * HEAD_DIM), *highs = at + (key_high + token * HALF);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            load(to.first[i], lows + 8 * i * HEAD_DIM);
            load(to.second[i], lows + 8 * i * HEAD_DIM + HALF);
            load(to.high[i], highs + 8 * i * HALF);
        }
    }

    __device__ __forceinline__ void load_values(Values& to, u32 block, u32 token) const {
        const u8* at = cache + static_cast<u64>(block) * BLOCK_BYTES;
        const u8 *lows = at + (value + token * HEAD_DIM), *highs = at + (value_high + token * HALF);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int n = i % 2 + i / 2 * 8;
            load(to.first[i], lows + n * HEAD_DIM);
            load(to.second[i], lows + n * HEAD_DIM + HALF);
            load(to.high[i], highs + n * HALF);
        }
    }

    __device__ __forceinline__ void load_powers(u32 (&to)[2], u32 block, u32 token) const {
        const u8* at = cache + static_cast<u64>(block) * BLOCK_BYTES + (powers + token * 4);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            u32 one[1];
            load(one, at + 8 * 4 * i);
            to[i] = one[0];
        }
    }
};

// Of head group(), numbers as in Keys: registers of B.
struct Query {
    u32 first[2 * KEY_WORDS], second[2 * KEY_WORDS];
};

__device__ __forceinline__ u32 enlarged(u32 pair) {
    return bfloat16s(__uint_as_float(pair << 16) * QUERY_FACTOR, __uint_as_float(pair & 0xFFFF0000) * QUERY_FACTOR);
}

// q: of the program's first head.
__device__ __forceinline__ void load_query(Query& to, const u16* q, int heads) {
#pragma unroll
    for (int i = 0; i < 2 * KEY_WORDS; ++i) to.first[i] = to.second[i] = 0;
    if (group() >= heads) return;
    const u8* at = reinterpret_cast<const u8*>(q + group() * HEAD_DIM + member() * 4 * KEY_WORDS);
    load(to.first, at);
    load(to.second, at + 2 * HALF);
#pragma unroll
    for (int i = 0; i < 2 * KEY_WORDS; ++i) to.first[i] = enlarged(to.first[i]), to.second[i] = enlarged(to.second[i]);
}

// [key group(), and + 8][head 2 member(), and + 1].
__device__ __forceinline__ void product(float (&scores)[4], const Keys& keys, const Query& query) {
    float other[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[i] = 0;
#pragma unroll
    for (int i = 0; i < KEY_WORDS; ++i) {
        const u32 a = first_of(keys.high[0][i]), b = first_of(keys.high[1][i]);
        multiply(scores, front(keys.first[0][i], a), front(keys.first[1][i], b), back(keys.first[0][i], a),
                 back(keys.first[1][i], b), query.first[2 * i], query.first[2 * i + 1]);
        const u32 c = second_of(keys.high[0][i]), d = second_of(keys.high[1][i]);
        multiply(other, front(keys.second[0][i], c), front(keys.second[1][i], d), back(keys.second[0][i], c),
                 back(keys.second[1][i], d), query.second[2 * i], query.second[2 * i + 1]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[i] += other[i];
}

// Two columns of each half, four keys of each: registers of A.
__device__ __forceinline__ void add_columns(float (&sum)[4], float (&next)[4], const u32 (&first)[2],
                                            const u32 (&second)[2], const u32 (&high)[2], const u32 (&weights)[2]) {
    const u32 a[2] = {first_of(high[0]), first_of(high[1])}, b[2] = {second_of(high[0]), second_of(high[1])};
    multiply(sum, front(first[0], a[0]), front(second[0], b[0]), front(first[1], a[1]), front(second[1], b[1]),
             weights[0], weights[1]);
    multiply(next, back(first[0], a[0]), back(second[0], b[0]), back(first[1], a[1]), back(second[1], b[1]),
             weights[0], weights[1]);
}

// weights: of head group(), tokens as in Values: registers of B.
__device__ __forceinline__ void add_values(float (&sums)[TILES][4], const Values& v, const u32 (&weights)[2]) {
#pragma unroll
    for (int i = 0; i < VALUE_WORDS; ++i) {
        const u32 first[2] = {front(v.first[0][i], v.first[1][i]), front(v.first[2][i], v.first[3][i])};
        const u32 second[2] = {front(v.second[0][i], v.second[1][i]), front(v.second[2][i], v.second[3][i])};
        const u32 high[2] = {front(v.high[0][i], v.high[1][i]), front(v.high[2][i], v.high[3][i])};
        add_columns(sums[4 * i], sums[4 * i + 1], first, second, high, weights);
        const u32 more_first[2] = {back(v.first[0][i], v.first[1][i]), back(v.first[2][i], v.first[3][i])};
        const u32 more_second[2] = {back(v.second[0][i], v.second[1][i]), back(v.second[2][i], v.second[3][i])};
        const u32 more_high[2] = {back(v.high[0][i], v.high[1][i]), back(v.high[2][i], v.high[3][i])};
        add_columns(sums[4 * i + 2], sums[4 * i + 3], more_first, more_second, more_high, weights);
    }
}

// ---------------------------------------------------------------- a warp's sums
// Of heads 2 member() and the next: their largest score so far or one not far below, the sum of this thread's weights, and
// weights x values, columns i and HALF + i of tile i beside group() * 4 VALUE_WORDS.
struct State {
    float top[2] = {LOWEST, LOWEST}, weight[2] = {0, 0};
    float sums[TILES][4] = {};

    // Weights of head group(), and makes room for larger ones.
    __device__ __forceinline__ void weigh(u32 (&weights)[2], const float (&scores)[4], const u32 (&powers)[2]) {
        const float most[2] = {fmaxf(scores[0], scores[2]), fmaxf(scores[1], scores[3])};
        if (__any_sync(0xFFFFFFFF, most[0] > top[0] + SLACK || most[1] > top[1] + SLACK)) raise(most);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float a = power_of_two(scores[2 * i] - top[0]), b = power_of_two(scores[2 * i + 1] - top[1]);
            weight[0] += a, weight[1] += b;
            const float power = power_of_value(powers[i]) * WEIGHT_FACTOR;
            weights[i] = transposed(bfloat16s(a * power, b * power));
        }
    }

    __device__ __forceinline__ void raise(const float (&most)[2]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float above = fmaxf(top[i], most[i]);
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) above = fmaxf(above, __shfl_xor_sync(0xFFFFFFFF, above, lanes));
            const float shrink = power_of_two(top[i] - above);
            top[i] = above;
            weight[i] *= shrink;
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) sums[tile][i] *= shrink, sums[tile][2 + i] *= shrink;
        }
    }

    // sums [HEADS][LINE], summary [2][HEADS]: the largest score of each head, and its weights' sum.
    __device__ __forceinline__ void store(float* to, float* summary) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int head = 2 * member() + i;
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) weight[i] += __shfl_xor_sync(0xFFFFFFFF, weight[i], lanes);
            if (group() == 0) summary[head] = top[i], summary[HEADS + head] = weight[i];
            float* at = to + head * LINE + group() * 4 * VALUE_WORDS;
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) at[tile] = sums[tile][i], at[HALF + tile] = sums[tile][2 + i];
        }
    }
};

// A warp's every WARPS-th round of keys begin to end; those before `lowest` are not seen.  q: see load_query.
__device__ __forceinline__ void attend(State& state, const Places& places, const u16* q, int heads, const int* table,
                                       int begin, int end, int lowest, float scale) {
    constexpr int STRIDE = WARPS * ROUND;
    const auto block_of = [&](int n) { return n < end ? table[static_cast<u32>(n) / BLOCK_SIZE] : 0; };
    const auto token_of = [](int n) { return static_cast<u32>(n) % BLOCK_SIZE / ROUND * ROUND; };
    int n = begin + threadIdx.x / 32 * ROUND;
    if (n >= end) return;
    u32 block = block_of(n), next_block = block_of(n + STRIDE);
    Keys keys;
    Values values;
    u32 powers[2];
    places.load_keys(keys, block, token_of(n));
    places.load_powers(powers, block, token_of(n));
    places.load_values(values, block, token_of(n));
    Query query;
    load_query(query, q, heads);
    // The next round's are on their way as soon as this one's are used up.
    for (bool more = true; more;) {
        float scores[4];
        product(scores, keys, query);
        const int now = n;
        n += STRIDE, block = next_block, more = n < end;
        if (more) {
            places.load_keys(keys, block, token_of(n));
            next_block = block_of(n + STRIDE);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[i] *= power_of_key(powers[i / 2]) * scale;
        if (now + ROUND > end || now < lowest) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int token = now + group() + 8 * i;
                if (token >= end || token < lowest) scores[2 * i] = scores[2 * i + 1] = NOTHING, powers[i] = 0;
            }
        }
        u32 weights[2];
        state.weigh(weights, scores, powers);
        if (more) places.load_powers(powers, block, token_of(n));
        add_values(state.sums, values, weights);
        if (more) places.load_values(values, block, token_of(n));
    }
}

// ---------------------------------------------------------------- a program's result
// Eight neighbouring columns of a head.
struct Eight {
    float top = LOWEST, weight = 0, sum[8] = {};
};

// From `count` summaries [count][2][heads] and sums [count][heads][line], in their order.  others: other programs' too.
template <bool OTHERS>
__device__ __forceinline__ Eight added(int count, const float* summary, const float* sums, int heads, int line, int head,
                                       int column) {
    constexpr int AT_ONCE = 4;
    const auto read = [](const float* at) { return OTHERS ? __ldcg(at) : *at; };
    const auto read_four = [](const float* at) { return OTHERS ? load_others(at) : *reinterpret_cast<const float4*>(at); };
    Eight all;
    for (int i = 0; i < count; i += AT_ONCE) {
        float top[AT_ONCE], weight[AT_ONCE];
        float4 sum[AT_ONCE][2];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            const int one = min(i + j, count - 1);  // Past the end the last again, without weight.
            const float *at = summary + one * 2 * heads + head, *from = sums + (one * heads + head) * line + column;
            top[j] = read(at), weight[j] = read(at + heads);
            sum[j][0] = read_four(from), sum[j][1] = read_four(from + 4);
        }
        float above = all.top;
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) above = fmaxf(above, top[j]);
        const float shrink = power_of_two(all.top - above);
        all.top = above, all.weight *= shrink;
#pragma unroll
        for (int j = 0; j < 8; ++j) all.sum[j] *= shrink;
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            if (i + j >= count) break;
            const float factor = power_of_two(top[j] - above);
            const float4 &a = sum[j][0], &b = sum[j][1];
            all.weight += factor * weight[j];
            all.sum[0] += factor * a.x, all.sum[1] += factor * a.y, all.sum[2] += factor * a.z, all.sum[3] += factor * a.w;
            all.sum[4] += factor * b.x, all.sum[5] += factor * b.y, all.sum[6] += factor * b.z, all.sum[7] += factor * b.w;
        }
    }
    return all;
}

__device__ __forceinline__ void write(u16* out, const Eight& of) {
    const float share = 1 / (of.weight == 0 ? 1 : of.weight);
    u32 line[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) line[i] = bfloat16s(of.sum[2 * i] * share, of.sum[2 * i + 1] * share);
    store(out, line);
}

// Whether all `count` programs of a row's KV head have stored what they leave: so for one of them.
__device__ __forceinline__ bool is_last(int* counter, int count) {
    __syncthreads();  // All threads have stored.
    bool last = false;
    if (threadIdx.x == 0) {
        last = count_up(counter) == count - 1;
        if (last) *counter = 0;
    }
    return __syncthreads_or(last);
}

// grid (KV heads x parts of their query heads, splits, sequences).  q, out [rows, heads, HEAD_DIM]; per_kv_head: query
// heads.  sums [sequences, KV heads, splits, per_kv_head, HEAD_DIM], summary [.., splits, 2, per_kv_head] and counters, all
// zero between launches, where rows have several splits.  scale: of scores, for powers of two.  window: 0 for none.
extern "C" __global__ void __launch_bounds__(THREADS, PROGRAMS)
    e4m7_decode(const u16* q, const u8* cache, u16* out, float* sums, float* summary, int* counters, const int* query_start,
                const int* context_len, const int* slots, const int* block_tables, int table_width, int first_sequence,
                int per_kv_head, int window, float scale) {
    extern __shared__ float4 memory[];
    float* shared_sums = reinterpret_cast<float*>(memory);           // [WARPS][HEADS][LINE]
    float* shared_summary = shared_sums + WARPS * (HEADS * LINE);    // [WARPS][2][HEADS]
    let_the_next_come_up();
    wait_for_kernels_before();
    const int parts = gridDim.x / KV_HEADS, part = blockIdx.x % parts, kv_head = blockIdx.x / parts;
    const int splits = gridDim.y, split = blockIdx.y, sequence = blockIdx.z;
    const int length = context_len[first_sequence + sequence];
    const u64 slot = slots[first_sequence + sequence], row = query_start[first_sequence + sequence];
    const int lowest = window ? max(length - window, 0) : 0, start = lowest / BLOCK_SIZE * BLOCK_SIZE;
    const int share = max((length - start + splits * STEP - 1) / (splits * STEP), 1) * STEP;
    const int begin = start + split * share, end = min(begin + share, length);
    if (begin >= length) return;
    const int first_head = part * HEADS, heads = min(per_kv_head - first_head, HEADS);
    const u64 place = ((row * KV_HEADS + kv_head) * per_kv_head + first_head) * HEAD_DIM;

    State state;
    attend(state, Places(cache, kv_head), q + place, heads, block_tables + slot * table_width, begin, end, lowest,
           SCORE_FACTOR * scale);
    const int warp = threadIdx.x / 32;
    state.store(shared_sums + warp * (HEADS * LINE), shared_summary + warp * (2 * HEADS));
    __syncthreads();

    const u64 mine = static_cast<u64>(sequence) * KV_HEADS + kv_head;
    sums += mine * splits * per_kv_head * HEAD_DIM;
    summary += mine * splits * 2 * per_kv_head;
    const int used = (length - start + share - 1) / share;
    for (int i = threadIdx.x; i < heads * (HEAD_DIM / 8); i += THREADS) {
        const int head = i / (HEAD_DIM / 8), column = i % (HEAD_DIM / 8) * 8;
        Eight all = added<false>(WARPS, shared_summary, shared_sums, HEADS, LINE, head, column);
#pragma unroll
        for (int j = 0; j < 8; ++j) all.sum[j] *= SUM_FACTOR;
        if (used == 1) {
            write(out + place + head * HEAD_DIM + column, all);
            continue;
        }
        float4* to = reinterpret_cast<float4*>(sums + (split * per_kv_head + first_head + head) * HEAD_DIM + column);
        to[0] = {all.sum[0], all.sum[1], all.sum[2], all.sum[3]}, to[1] = {all.sum[4], all.sum[5], all.sum[6], all.sum[7]};
        if (column == 0) {
            float* at = summary + split * 2 * per_kv_head + first_head + head;
            at[0] = all.top, at[per_kv_head] = all.weight;
        }
    }
    if (used == 1 || !is_last(counters + mine * parts + part, used)) return;
    for (int i = threadIdx.x; i < heads * (HEAD_DIM / 8); i += THREADS) {
        const int head = i / (HEAD_DIM / 8), column = i % (HEAD_DIM / 8) * 8;
        write(out + place + head * HEAD_DIM + column,
              added<true>(used, summary, sums, per_kv_head, HEAD_DIM, first_head + head, column));
    }
}
