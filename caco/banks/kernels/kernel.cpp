// The bank on a CPU: scores, sums and updates of a block of rows in one visit, with memory for one block a thread.
//
// Two products with the queries per pass, both in tiles that stay in the cache: cosines (MR queries x 16 rows), their
// exponentials while they are still in registers, and the sum that they weigh. Unit vectors bound a cosine by 1, so a
// fixed shift takes the place of a running maximum. Called through ctypes by caco/banks/kernels/fused.py; float32.
//
// One binary serves every machine: kernel.h is compiled for plain vectors, for AVX2 with FMA and for AVX-512 ("wide" is the
// tile of AVX-512 in AVX2's instructions, for tests), amx.h for AMX tiles, and the best that the processor has is taken when
// it is called.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#define HAS_AMX
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // some compilers' own intrinsics

namespace {

constexpr int PANEL = 16;            // rows, or columns, that lie side by side in a packed panel
constexpr int64_t QUERY_TILE = 96;   // queries in a tile; a multiple of every MR
constexpr int TOP = 4;               // candidates kept for each key
constexpr int64_t MOST_ROW_SHARES = 64;
constexpr float LOG2_E = 1.44269504088896341f;

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Rows in a block: its packed copies and a tile of scores share a core's second-level cache. A multiple of 16 and every MR.
int64_t block_rows(int64_t D) { return D <= 128 ? 192 : 96; }

struct Buffer {
    explicit Buffer(int64_t count) : at(nullptr) {
        if (count && posix_memalign((void**)&at, 64, count * sizeof(float))) throw std::bad_alloc();
        if (count) memset(at, 0, count * sizeof(float));
    }
    ~Buffer() { free(at); }
    Buffer(const Buffer&) = delete;
    float& operator[](int64_t i) { return at[i]; }
    float* at;
};

struct Forward {
    const float *q, *w;  // q padded to whole tiles
    int64_t D;
    bool second;  // whether the bank has a temperature of its own
    float inverse_tau, inverse_tau2, shift, shift2;
};

struct Update {
    const float *q, *weighted;  // [padded, D]; times grad, in panels [d / 16][padded][16]
    const float *log_sum, *grad;
    const int64_t *first_of_row, *by_row;  // the queries whose positive is row j are by_row[first_of_row[j] ...]
    float *w, *v;
    int64_t R, D, padded;
    float inverse_tau, pull, push, lr, momentum, weight_decay;
    bool normalise;
};

// Put those of a row of scores that are good enough into the TOP best; equal scores stay in the order of their rows.
void insert(const float* row, int64_t valid, int64_t first, float* values, int64_t* index) {
    for (int64_t j = 0; j < valid; j++) {
        int at = TOP;
        while (at > 0 && row[j] > values[at - 1]) at--;
        for (int to = TOP - 1; to > at; to--) values[to] = values[to - 1], index[to] = index[to - 1];
        if (at < TOP) values[at] = row[j], index[at] = first + j;
    }
}

template <typename Ints>
inline bool any(const Ints& lanes) {
    int64_t words[sizeof(Ints) / 8];
    memcpy(words, &lanes, sizeof(Ints));
    int64_t together = 0;
    for (int64_t word : words) together |= word;
    return together != 0;
}

#define TARGET
#define V 4
#define MR 3
namespace plain {
#include "kernel.h"
}
#undef TARGET
#undef V
#undef MR

#if defined(__x86_64__)
#define TARGET __attribute__((target("avx2,fma")))
#define V 8
#define MR 6
namespace avx2 {
#include "kernel.h"
}
#undef V
#undef MR
#define V 16
#define MR 12
namespace wide {
#include "kernel.h"
}
#undef TARGET
#define TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma,prefer-vector-width=512")))
namespace avx512 {
#include "kernel.h"
}
#undef TARGET
#undef V
#undef MR
#endif

// Run work(0), ..., work(count - 1) on some threads; they are gone when this returns, so a process may fork at any time.
template <typename Work>
bool in_parallel(int threads, int64_t count, Work work) {
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    auto loop = [&] {
        try {
            for (int64_t i; (i = next++) < count;) work(i);
        } catch (const std::bad_alloc&) {
            failed = true;
        }
    };
    std::vector<std::thread> others;
    for (int t = 1; t < threads && t < count; t++) {
        try {
            others.emplace_back(loop);
        } catch (const std::system_error&) {  // no more threads to be had: fewer do it
            break;
        }
    }
    loop();
    for (auto& thread : others) thread.join();
    return !failed;
}

// The `top` best of some shares of the rows, [share][padded][top], for each of G keys; equal ones by index.
void merge(const std::vector<float>& best, const std::vector<int64_t>& rows, int64_t padded, int64_t shares, int64_t G, int top,
           float* values, int64_t* index) {
    for (int64_t i = 0; i < G; i++) {
        int64_t taken[MOST_ROW_SHARES] = {};
        for (int t = 0; t < top; t++) {
            int64_t from = 0, at = -1;
            for (int64_t share = 0; share < shares; share++) {
                if (taken[share] == top) continue;
                const int64_t here = (share * padded + i) * top + taken[share];
                if (at < 0 || best[here] > best[at] || (best[here] == best[at] && rows[here] < rows[at])) at = here, from = share;
            }
            values[i * top + t] = best[at], index[i * top + t] = rows[at];
            taken[from]++;
        }
    }
}

// The rounding of a float32 sum of D products of unit vectors, at its very worst.
float sum_error(int64_t D) { return (D + 8) * 1.1920929e-7f; }

#if defined(HAS_AMX)
namespace amx {
#include "amx.h"
}
#endif

enum Set { PLAIN, AVX2, AVX512, AMX, WIDE };  // as caco/instructions.py numbers them

int best_set() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl")) {
#if defined(HAS_AMX)
        if (amx::available()) return AMX;
#endif
        return AVX512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
    return PLAIN;
}

// The best instruction set of this processor that is no better than the one asked for; asked = -1 sets no bound.
int chosen(int asked) {
    static const int best = best_set();  // looked for whatever was asked: it gets the permission to use tiles
    if (asked == WIDE) return best >= AVX2 ? WIDE : PLAIN;
    return asked < 0 ? best : std::min(asked, best);
}

#if defined(__x86_64__)
#define DISPATCH(set, call)                     \
    switch (set) {                              \
        case AVX512: avx512::call; break;       \
        case WIDE: wide::call; break;           \
        case AVX2: avx2::call; break;           \
        default: plain::call;                   \
    }
#else
#define DISPATCH(set, call) plain::call
#endif

// How queries and rows are shared out: every thread has its queries; where those are few, the rows are cut too.
struct Shares {
    Shares(int64_t G, int64_t R, int64_t D, int& threads) {
        if ((double)G * R * D < 4.0e6) threads = 1;  // less work than starting a thread
        queries = std::max<int64_t>(48, round_up((G + threads - 1) / threads, 12));
        query_shares = (G + queries - 1) / queries;
        const int64_t blocks = (R + block_rows(D) - 1) / block_rows(D);
        const int64_t wanted = std::min<int64_t>({blocks, MOST_ROW_SHARES, (threads + query_shares - 1) / query_shares});
        rows = (blocks + wanted - 1) / wanted * block_rows(D);
        row_shares = (R + rows - 1) / rows;
    }
    int64_t queries, query_shares, rows, row_shares;
};

}  // namespace

extern "C" {

// The Set that serves where this one is asked for, as `set` of the functions below.
int caco_set(int asked) { return chosen(asked); }

// How many candidates caco_nearest keeps for each key, T.
int caco_top(int set) {
#if defined(HAS_AMX)
    if (chosen(set) == AMX) return amx::TOP;
#endif
    return TOP;
}

// For each of G queries over R rows of any norm, m = w / |w|:
//   z = sum_j exp(inverse_tau q.m_j - shift), z2 the same at a second temperature (null for none), peak = max_j q.m_j,
//   sums = sum_j exp(...) m_j  [G, D] (null for none).
// Returns 0, or 1 where memory ran out. A row of norm zero, and anything that is not finite, makes z not finite.
// low: AMX may round to bfloat16; the other sets are float32 whatever it says.
int caco_forward(const float* q, int64_t G, const float* w, int64_t R, int64_t D, float inverse_tau, float shift,
                 float inverse_tau2, float shift2, double* z, double* z2, float* peak, float* sums, int low, int threads,
                 int set) try {
    set = chosen(set);
#if defined(HAS_AMX)
    if (set == AMX) {
        const Forward f{q, w, D, z2 != nullptr, inverse_tau, inverse_tau2, shift, shift2};
        return !(low ? amx::forward<1> : amx::forward<2>)(f, G, R, z, z2, peak, sums, threads);
    }
#endif
    const Shares shares(G, R, D, threads);
    const int64_t wide = round_up(D, PANEL), share = shares.queries, padded = shares.query_shares * share;
    Buffer padded_q(padded * D);
    memcpy(padded_q.at, q, G * D * sizeof(float));
    const Forward f{padded_q.at, w, D, z2 != nullptr, inverse_tau, inverse_tau2, shift, shift2};
    std::vector<double> totals(padded * shares.row_shares), totals2(z2 ? padded * shares.row_shares : 0);
    std::vector<float> peaks(padded * shares.row_shares, -3.0e38f);
    Buffer weighed(sums ? padded * shares.row_shares * wide : 0);
    const bool done = in_parallel(threads, shares.query_shares * shares.row_shares, [&](int64_t part) {
        const int64_t qs = part % shares.query_shares, rs = part / shares.query_shares;
        const int64_t at = rs * padded + qs * share;
        const int64_t last = round_up(std::min(G, (qs + 1) * share), 12), last_row = std::min(R, (rs + 1) * shares.rows);
        DISPATCH(set, forward_part(f, qs * share, last, rs * shares.rows, last_row, &totals[at], z2 ? &totals2[at] : nullptr,
                                   &peaks[at], sums ? &weighed[at * wide] : nullptr));
    });
    if (!done) return 1;
    for (int64_t i = 0; i < G; i++) {
        z[i] = 0, peak[i] = -3.0e38f;
        if (z2) z2[i] = 0;
        for (int64_t rs = 0; rs < shares.row_shares; rs++) {
            z[i] += totals[rs * padded + i];
            if (z2) z2[i] += totals2[rs * padded + i];
            peak[i] = std::max(peak[i], peaks[rs * padded + i]);
        }
        for (int64_t d = 0; sums && d < D; d++) {
            float total = 0;
            for (int64_t rs = 0; rs < shares.row_shares; rs++) total += weighed[(rs * padded + i) * wide + d];
            sums[i * D + d] = total;
        }
    }
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

// The T rows of the largest cosines for each of G keys, best first, equal ones by index: values and index [G, T], and a bound
// on the error of each key's values [G]. Rows further than twice that behind the best may be left out (-3e38 and -1).
int caco_nearest(const float* k, int64_t G, const float* w, int64_t R, int64_t D, float* values, int64_t* index, float* error,
                 int threads, int set) try {
    set = chosen(set);
    Forward f{k, w, D, false, 0, 0, 0, 0};
#if defined(HAS_AMX)
    if (set == AMX) return !amx::nearest(f, G, R, values, index, error, threads);
#endif
    const Shares shares(G, R, D, threads);
    const int64_t share = shares.queries, padded = shares.query_shares * share;
    std::vector<float> best(padded * shares.row_shares * TOP, -3.0e38f);
    std::vector<int64_t> rows(padded * shares.row_shares * TOP, -1);
    Buffer padded_k(padded * D);
    memcpy(padded_k.at, k, G * D * sizeof(float));
    f.q = padded_k.at;
    const bool done = in_parallel(threads, shares.query_shares * shares.row_shares, [&](int64_t part) {
        const int64_t qs = part % shares.query_shares, rs = part / shares.query_shares;
        const int64_t at = (rs * padded + qs * share) * TOP;
        const int64_t last = round_up(std::min(G, (qs + 1) * share), 12), last_row = std::min(R, (rs + 1) * shares.rows);
        DISPATCH(set, nearest_part(f, qs * share, last, rs * shares.rows, last_row, &best[at], &rows[at]));
    });
    if (!done) return 1;
    merge(best, rows, padded, shares.row_shares, G, TOP, values, index);
    std::fill_n(error, G, sum_error(D));
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

// Move R rows and their velocities along the gradient of N queries (caco/equations.py: bank_gradient, bank_update).
//   positive: [N], a row of these or anything else; log_sum: of each query at this temperature; grad: weight of its loss.
int caco_update(const float* q, const int64_t* positive, const float* log_sum, const float* grad, int64_t N, float* w,
                float* v, int64_t R, int64_t D, float inverse_tau, float pull, float push, float lr, float momentum,
                float weight_decay, int normalise, int low, int threads, int set) try {
    set = chosen(set);
    std::vector<int64_t> first_of_row(R + 1), by_row(N);
    for (int64_t i = 0; i < N; i++)
        if (positive[i] >= 0 && positive[i] < R) first_of_row[positive[i]]++;
    for (int64_t j = 0; j < R; j++) first_of_row[j + 1] += first_of_row[j];  // ends, which the next loop takes back to starts
    for (int64_t i = N - 1; i >= 0; i--)
        if (positive[i] >= 0 && positive[i] < R) by_row[--first_of_row[positive[i]]] = i;
    Update u{q, nullptr, log_sum, grad, first_of_row.data(), by_row.data(), w, v, R, D, N,
             inverse_tau, pull, push, lr, momentum, weight_decay, normalise != 0};
#if defined(HAS_AMX)
    if (set == AMX) return !(low && amx::in_range(u, N) ? amx::update<1> : amx::update<2>)(u, N, threads);
#endif
    const int64_t wide = round_up(D, PANEL), S = block_rows(D), padded = round_up(N, 12);
    Buffer padded_q(padded * D), weighted(padded * wide), sums(padded), weights(padded);
    memcpy(padded_q.at, q, N * D * sizeof(float));
    memcpy(sums.at, log_sum, N * sizeof(float));
    memcpy(weights.at, grad, N * sizeof(float));
    for (int64_t i = 0; i < N; i++)
        for (int64_t d = 0; d < D; d++)
            weighted[(d / PANEL) * padded * PANEL + i * PANEL + d % PANEL] = q[i * D + d] * grad[i];
    u.q = padded_q.at, u.weighted = weighted.at, u.log_sum = sums.at, u.grad = weights.at, u.padded = padded;
    if ((double)N * R * D < 4.0e6) threads = 1;
    const int64_t blocks = (R + S - 1) / S, workers = std::max<int64_t>(1, std::min<int64_t>(threads, blocks));
    std::atomic<int64_t> block{0};
    const bool done = in_parallel((int)workers, workers, [&](int64_t) {
        Buffer transposed(S * D), tile(QUERY_TILE * (S + PANEL)), toward(S * wide), inverse_norm(S);
        for (int64_t b; (b = block++) < blocks;)
            DISPATCH(set, update_block(u, b * S, transposed.at, tile.at, toward.at, inverse_norm.at));
    });
    return done && block >= blocks ? 0 : 1;
} catch (const std::bad_alloc&) {
    return 1;
}
}
