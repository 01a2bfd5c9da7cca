// What the passes of all instruction sets share: their arguments, memory, threads, and the candidates of a search.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace {

constexpr int PANEL = 16;            // rows, or columns, that lie side by side in a packed panel
constexpr int64_t QUERY_TILE = 96;   // queries in a tile; a multiple of every set's MR
constexpr int TOP = 4;               // candidates kept for each key
constexpr int KEPT = 32;             // candidates kept for each key by a search in integers
constexpr float LENGTH = 32700.0f;   // norm of a vector in 16-bit integers, so that none of its numbers rounds to more than 32767
constexpr int64_t MOST_ROW_SHARES = 64;
constexpr float LOG2_E = 1.44269504088896341f;

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Rows in a block, so that its packed copies and a tile of scores fit into a core's second-level cache. A multiple of 16 and every MR.
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
    const float *q, *w;  // q is padded to whole tiles
    int64_t D;
    bool second;  // whether the bank has a temperature of its own
    float inverse_tau, inverse_tau2, shift, shift2;
    float* kept = nullptr;  // [block of rows][kept_queries][block_rows(D)]: takes the exponentials at the bank's temperature
    int64_t kept_queries = 0;
};

// Where one query's exponentials begin that a forward pass kept: those of block b of the rows are the block_rows(D) numbers at
// at + b * stride. Times `factor` they are the query's probabilities. at is null for the queries that pad the last tile.
struct Kept {
    const float* at;
    int64_t stride;
    float factor;
};

struct Update {
    const float *q, *weighted;  // queries [padded, D]; the queries times grad, in panels [d / 16][padded][16]
    const float *log_sum, *grad;
    const int64_t *first_of_row, *by_row;  // the queries whose positive is row j are by_row[first_of_row[j] ...]
    const Kept* kept;  // one for each query up to `padded`; null: the probabilities are computed
    float *w, *v;
    int64_t R, D, padded;
    float inverse_tau, pull, push, lr, momentum, weight_decay;
    bool normalise;
};

// Inserts scores of consecutive rows into the T best so far, where they are better; equal scores stay in the order of their rows.
template <int T>
inline void insert(const float* row, int64_t valid, int64_t first, float* values, int64_t* index) {
    for (int64_t j = 0; j < valid; j++) {
        int at = T;
        while (at > 0 && row[j] > values[at - 1]) at--;
        for (int to = T - 1; to > at; to--) values[to] = values[to - 1], index[to] = index[to - 1];
        if (at < T) values[at] = row[j], index[at] = first + j;
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

// Runs work(0), ..., work(count - 1) on up to `threads` threads. All threads have ended when this returns, so the process may fork at
// any other time. Returns whether no call ran out of memory.
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
        } catch (const std::system_error&) {  // the system gives no more threads: fewer do the work
            break;
        }
    }
    loop();
    for (auto& thread : others) thread.join();
    return !failed;
}

// Merges, for each of G keys, the `top` best rows of several shares of the rows, [share][padded][top], into the `top` best of all;
// equal ones by index.
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

// A bound on the rounding error of a float32 sum of D products, for unit vectors.
inline float sum_error(int64_t D) { return (D + 8) * 1.1920929e-7f; }

// About a vector that was rounded to integers: its norm before, the number that the integer 1 stands for, and the norm of the rounding
// error.
struct Rounded {
    float norm, step, lost;
};

// How many words of 32 bits hold D numbers.
template <typename Number>
int64_t words_of(int64_t D) {
    return round_up(D, 4 / (int64_t)sizeof(Number)) * (int64_t)sizeof(Number) / 4;
}

// Keys rounded to integers, padded with zero keys: see integers.h.
struct WholeKeys {
    std::vector<int32_t> words, before;
    std::vector<Rounded> of;

    // How far a row's score, in steps of key i, may lie below the best score while the row can still be the nearest: twice the bound on
    // a score's error. `lost` is the largest norm of the rounding error of a unit row.
    float reach(int64_t i, float lost, int64_t D) const {
        const Rounded& key = of[i];
        return 2.002f * (key.lost + (key.norm + key.lost) * (lost + sum_error(D))) / key.step;
    }
};

// How queries and rows are shared between threads: each thread has its own queries; where there are too few queries, the rows are cut
// into shares too.
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
