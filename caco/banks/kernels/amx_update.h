// The rows' motion on AMX tiles: the probabilities of 32 rows and 32 queries are computed while the tiles multiply.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

#include "amx_exponentials.h"
#include "amx_packing.h"
#include "amx_tiles.h"
#include "sets.h"

#if defined(HAS_AMX)
namespace {
namespace amx {

constexpr int64_t QUERY_CHUNK = 512;  // queries whose probabilities an update holds at a time

// The probabilities of 32 rows and the queries of a chunk, as a left factor. Of each 32 queries, one of the first 16 and one of the last 16
// follow one another in turn.
template <int PARTS>
struct Share {
    const Update& u;
    const float* offset;  // for each of the chunk's queries: see offset_of
    Packed& tile;
    const __m512 a;
    const float* scores = nullptr;
    int64_t group = 0;

    MEMBER Share(const Update& u, const float* offset, Packed& tile)
        : u(u), offset(offset), tile(tile), a(_mm512_set1_ps(u.inverse_tau * LOG2_E)) {}
    MEMBER void begin(const float* scores_, int64_t group_) { scores = scores_, group = group_; }
    MEMBER void end() {}
    MEMBER void piece(int64_t piece) {
        const __m512 b = _mm512_load_ps(offset + group * GROUP), b_next = _mm512_load_ps(offset + group * GROUP + 16);
        const float* at = scores + piece * PIECE * GROUP;
        bf16* to = tile.at + (piece / (16 / PIECE) * (QUERY_CHUNK / GROUP) + group) * TILE + piece % (16 / PIECE) * PIECE * GROUP;
        __m512 sum;
        __m512i most;
#pragma GCC unroll 4
        for (int row = 0; row < PIECE; row++) {
            __m512i parts[PARTS];
            exponentials<PARTS>(_mm512_load_ps(at + row * GROUP), _mm512_load_ps(at + row * GROUP + 16), a, b, b_next, parts, sum, most);
            for (int part = 0; part < PARTS; part++) _mm512_store_si512(to + part * tile.part + row * GROUP, parts[part]);
        }
    }
};

// Updates blocks of rows (see caco_update). The thread takes one block after the other from the counter `block`, which all threads share.
// `weighted` has padded / 32 tiles for every 16 columns of D.
template <int PARTS>
AMX_TARGET static void update_part(const Update& u, const Packed& queries, const Packed& weighted, const float* offset, std::atomic<int64_t>& block) {
    const int64_t D = round_up(u.D, GROUP), S = block_rows(D), steps = u.padded / GROUP;
    Packed rows(S * D, PARTS), tile(GROUP * QUERY_CHUNK, PARTS);
    Buffer scratch(4 * SUMS), toward(S * D), inverse_norm(S), together(D);
    const Tiles ready;
    for (int64_t start; (start = block++ * S) < u.R;) {
        const int64_t count = std::min(S, u.R - start);
        pack<PARTS>(u.w + start * u.D, count, u.D, D, rows, inverse_norm.at);
        if (u.push == 0.0f) memset(toward.at, 0, S * D * sizeof(float));
        for (int64_t i = 0; u.push != 0.0f && i < u.padded; i += QUERY_CHUNK) {
            const int64_t groups = std::min(QUERY_CHUNK, u.padded - i) / GROUP;
            for (int64_t j = 0; j < count; j += GROUP) {
                Share<PARTS> work(u, offset + i, tile);
                scan<PARTS>(rows, rows.at + j * D, 0, queries, queries.at + i * D, GROUP * D, D, groups, GROUP * groups, 0, scratch.at, work);
                accumulate<PARTS>(tile, tile.at, QUERY_CHUNK / GROUP * TILE, 0, weighted, weighted.at + i / GROUP * TILE, steps * TILE,
                                  2 * steps * TILE, groups, i == 0, Sums{toward.at + j * D, SUMS, D * 16, 64}, GROUP * 16, D / GROUP);
            }
        }
        for (int64_t j = 0; j < count; j++) {
            for (int64_t d = 0; d < D; d += 16) {
                _mm_prefetch((const char*)(u.v + (start + j) * u.D + d + AHEAD), _MM_HINT_T0);
                _mm512_store_ps(together.at + d, _mm512_load_ps(toward.at + j / 16 * D * 16 + d * 16 + j % 16 * 16));
            }
            avx512::move_row(u, start + j, inverse_norm[j], together.at);
        }
    }
}

// Whether `exponentials` with one bfloat16 can represent the exponent of every probability.
bool in_range(const Update& u, int64_t N) {
    for (int64_t i = 0; i < N; i++)
        if (!((-1.01f * u.inverse_tau - u.log_sum[i]) * LOG2_E > LOWEST_EXPONENT)) return false;
    return true;
}

template <int PARTS>
bool update(Update& u, int64_t N, int threads) {
    const int64_t D = round_up(u.D, GROUP), padded = round_up(N, GROUP), S = block_rows(D);
    Packed queries(padded * D, PARTS), weighted(padded * D, PARTS);
    Buffer offset(padded), weight(N);
    for (int64_t i = 0; i < padded; i++) {
        const float exponent = i < N ? -u.log_sum[i] * LOG2_E : -200.0f;  // makes the probabilities of padding 0
        offset[i] = offset_of<PARTS>(exponent);
        if (i < N) weight[i] = u.grad[i] * left_out<PARTS>(exponent);
    }
    pack_queries<PARTS>(u.q, N, u.D, D, queries);
    pack_weighted<PARTS>(u.q, weight.at, N, u.D, D, padded / GROUP, weighted);
    u.padded = padded;
    const int64_t workers = worth(N, u.R, D, threads);
    std::atomic<int64_t> block{0};
    return in_parallel((int)workers, workers, [&](int64_t) { update_part<PARTS>(u, queries, weighted, offset.at, block); }) &&
           block * S >= u.R;
}

}  // namespace amx
}  // namespace
#endif
