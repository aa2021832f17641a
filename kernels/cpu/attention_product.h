// The products of an attention: codes of q times keys, codes of P times values. AMX has its own, in attention_product_amx.h.
#pragma once

#include "product.h"

namespace mptqc {

template <class L>
class AttentionProduct {
 public:
  static constexpr int kRows = static_cast<int>(least(Product<L>::kRows, kMostAttentionRows));

  AttentionProduct(const mptqc_attention&, const AttentionScratch&, uint8_t*, int32_t span) : product_(span) {}

  // The rows of queries that `scores` multiplies next.
  void set_queries(int rows, Codes queries) {
    rows_ = rows;
    queries_ = queries;
  }

  // Whether `scores` writes sums where it is told to, in rows of `stride`, or gives those of the panel in rows of kPanel, until
  // the next are made.
  static constexpr bool kWritesSums = false;

  // offset[c] + sum_d q[r, d] * k[c, d] for the columns of `blocks` <= kPanelBlocks blocks.
  const int32_t* scores(int blocks, Blocks keys, const int32_t* offset, int32_t*, int64_t) {
    product_.multiply(rows_, blocks, queries_, keys, offset, tile_, [](int) {});
    return tile_.sum[0];
  }

  // The same of codes of P and values; sums lie in a tile of rows of kPanel.
  const int32_t* context(int rows, int blocks, Codes p, Blocks values, const int32_t* offset) {
    product_.multiply(rows, blocks, p, values, offset, tile_, [](int) {});
    return tile_.sum[0];
  }

  // Called before each row of scores that is worked on.
  void stay_awake() {}

 private:
  Product<L> product_;
  Tile<Product<L>::kRows> tile_ = {};
  int rows_ = 0;
  Codes queries_ = {};
};

}  // namespace mptqc
