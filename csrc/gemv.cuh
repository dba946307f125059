// What gemv_awq.cu and gemv_int8.cu have in common: layers of one input in one launch, their
// outputs numbered through in tiles of 16.
#pragma once

#include "device.cuh"

#ifndef SVDQ_WARPS  // ---- a default build, so that editors and linters see code ----
#    define SVDQ_WARPS 12
#    define SVDQ_STAGES 2
#    define SVDQ_LAYERS 1
#endif

constexpr int kStages = SVDQ_STAGES, kLayers = SVDQ_LAYERS;
constexpr int kRows = 16;                  // outputs of a tile
constexpr bool kEarly = SVDQ_ARCH >= 900;  // whether the first tile is fetched before the wait
static_assert(kStages <= 2);

// `Layer` has a layer's pointers, and
//
//     int n;
//     int before;  // outputs of the layers before it
template <class Layer>
struct Arguments {
    const u16* x;  // (M, K)
    u16* out;      // (M, N) of each layer, one after the other
    int m, k;
    int rounds;         // until the warps have gone through K
    int tiles, longer;  // of a block; the first `longer` blocks have one more
    int batch;          // tiles whose sums are kept at once
    Layer layers[kLayers];
};

// Where a tile is: its layer, and its first output.
struct Place {
    int layer, n;

    // n may have gone beyond its layer; there must be a tile at this place.
    template <class Layer>
    SVDQ_DEVICE void settle(const Arguments<Layer>& p) {
        if constexpr (kLayers > 1)
            for (; n >= p.layers[layer].n; ++layer)
                n -= (p.layers[layer].n + kRows - 1) / kRows * kRows;
    }

    // The first output, earlier than settled where the layer ends in the middle of a tile.
    template <class Layer>
    SVDQ_DEVICE int first(const Arguments<Layer>& p) const {
        return min(n, p.layers[layer].n - kRows);
    }
};
