// The search for the nearest rows on instruction sets without tiles. Where the processor multiplies integers faster, it begins with
// integers: then the rows that can still be the nearest are compared in float32. For keys that leave too many such rows, all rows are.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bank.h"
#include "sets.h"

namespace {

struct Keys {
    const float* at;
    int64_t count;
};

// The search in float32 throughout: see caco_nearest.
bool nearest_in_floats(const Keys& keys, const float* w, int64_t R, int64_t D, float* values, int64_t* index, float* error, int threads,
                       int set) {
    const Shares shares(keys.count, R, D, threads);
    const int64_t share = shares.queries, padded = shares.query_shares * share;
    std::vector<float> best(padded * shares.row_shares * TOP, -3.0e38f);
    std::vector<int64_t> rows(padded * shares.row_shares * TOP, -1);
    Buffer padded_k(padded * D);
    memcpy(padded_k.at, keys.at, keys.count * D * sizeof(float));
    const Forward f{padded_k.at, w, D, false, 0, 0, 0, 0};
    const bool done = in_parallel(threads, shares.query_shares * shares.row_shares, [&](int64_t part) {
        const int64_t qs = part % shares.query_shares, rs = part / shares.query_shares;
        const int64_t at = (rs * padded + qs * share) * TOP;
        const int64_t last = round_up(std::min(keys.count, (qs + 1) * share), 12), last_row = std::min(R, (rs + 1) * shares.rows);
        DISPATCH(set, nearest_part(f, qs * share, last, rs * shares.rows, last_row, &best[at], &rows[at]));
    });
    if (!done) return false;
    merge(best, rows, padded, shares.row_shares, keys.count, TOP, values, index);
    std::fill_n(error, keys.count, sum_error(D));
    return true;
}

// The same search in integers, and in float32 for the rows that the integers leave undecided. crowded: the keys that leave more such rows
// than are kept, and the keys without a direction; for these keys nothing is written.
bool nearest_in_integers(const Integers& in, const Keys& keys, const float* w, int64_t R, int64_t D, float* values, int64_t* index,
                         float* error, std::vector<int64_t>& crowded, int threads, int set) {
    const int64_t G = keys.count, padded = round_up(G, 12), blocks = (R + block_rows(D) - 1) / block_rows(D);
    if ((double)G * R * D < 4.0e6) threads = 1;
    // The threads share the rows and not the keys, so that every row is rounded only once.
    const int64_t wanted = std::min<int64_t>({blocks, MOST_ROW_SHARES, threads}), rows = (blocks + wanted - 1) / wanted * block_rows(D);
    const int64_t shares = (R + rows - 1) / rows;
    WholeKeys whole{std::vector<int32_t>(padded * in.depth(D)), std::vector<int32_t>(padded), std::vector<Rounded>(padded)};
    in.round_keys(keys.at, G, D, whole);
    std::vector<float> best(padded * shares * KEPT, -3.0e38f), lost(shares), first(G * KEPT);
    std::vector<int64_t> found(padded * shares * KEPT, -1), kept(G * KEPT);
    const bool done = in_parallel(threads, shares, [&](int64_t part) {
        in.nearest_part(whole, w, D, part * rows, std::min(R, (part + 1) * rows), &best[part * padded * KEPT], &found[part * padded * KEPT],
                        &lost[part]);
    });
    if (!done) return false;
    merge(best, found, padded, shares, G, KEPT, first.data(), kept.data());
    const float most_lost = *std::max_element(lost.begin(), lost.end());
    for (int64_t i = 0; i < G; i++) {
        const float* score = &first[i * KEPT];
        const float reach = score[0] - whole.reach(i, most_lost, D);
        if (kept[i * KEPT] < 0 || score[KEPT - 1] >= reach) {
            crowded.push_back(i);
            continue;
        }
        int64_t count = 0;
        while (score[count] >= reach) count++;
        std::sort(&kept[i * KEPT], &kept[i * KEPT] + count);  // by row, so that equal cosines stay in the order of their rows
        std::fill_n(values + i * TOP, TOP, -3.0e38f), std::fill_n(index + i * TOP, TOP, -1);
        for (int64_t c = 0; c < count; c++) {
            const int64_t j = kept[i * KEPT + c];
            float cosine = 0;
            DISPATCH(set, cosine_of(keys.at + i * D, w + j * D, D, &cosine));
            insert<TOP>(&cosine, 1, j, values + i * TOP, index + i * TOP);
        }
        error[i] = sum_error(D);
    }
    return true;
}

// Tries the searches in turn, the fastest first, each for the keys that the one before could not decide.
bool nearest(const float* k, int64_t G, const float* w, int64_t R, int64_t D, float* values, int64_t* index, float* error, int threads,
             int set) {
    std::vector<int64_t> left(G), crowded;
    for (int64_t i = 0; i < G; i++) left[i] = i;
    std::vector<float> some;
    std::vector<Integers> ways = integers_of(set, D);
    for (size_t way = 0; way <= ways.size() && !left.empty(); way++) {
        const bool all = left.size() == (size_t)G;
        const Keys keys{all ? k : some.data(), (int64_t)left.size()};
        std::vector<float> their_values(keys.count * TOP), their_error(keys.count);
        std::vector<int64_t> their_index(keys.count * TOP);
        crowded.clear();
        if (!(way < ways.size() ? nearest_in_integers(ways[way], keys, w, R, D, their_values.data(), their_index.data(), their_error.data(),
                                                      crowded, threads, set)
                                : nearest_in_floats(keys, w, R, D, their_values.data(), their_index.data(), their_error.data(), threads, set)))
            return false;
        for (int64_t c = 0; c < keys.count; c++) {  // crowded keys too: the next search overwrites their results
            std::copy_n(&their_values[c * TOP], TOP, values + left[c] * TOP);
            std::copy_n(&their_index[c * TOP], TOP, index + left[c] * TOP);
            error[left[c]] = their_error[c];
        }
        std::vector<float> next(crowded.size() * D);
        for (size_t c = 0; c < crowded.size(); c++) std::copy_n(keys.at + crowded[c] * D, D, &next[c * D]), crowded[c] = left[crowded[c]];
        some.swap(next), left.swap(crowded);
    }
    return true;
}

}  // namespace
