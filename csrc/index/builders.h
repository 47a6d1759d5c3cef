#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

// Index arithmetic of Megatron-LM (arXiv:1909.08053), in int64 throughout and without its asserts.
namespace megalite {

struct Place {
  int64_t position, offset;  // in the document order; in that document's tokens
};

// The boundaries of samples of `seq_len` tokens in the stream of documents lengths(0), lengths(1), … (already in
// order). Row k is the end of sample k - 1 and the start of sample k. With `extra`, each sample also covers the first
// token of the next, its last label, and row k is the place of token k · seq_len; without, it is the place after the
// token before. `keep_last` adds the end of a last, shorter sample.
template <class Lengths>
std::vector<Place> sample_index(int64_t documents, Lengths lengths, int64_t seq_len, bool extra, bool keep_last) {
  if (seq_len < 1) throw std::invalid_argument("seq_len=" + std::to_string(seq_len) + " must be at least 1");
  const int64_t after = extra ? 0 : 1;
  std::vector<Place> rows{{0, 0}};
  Place last{0, 0};                // the place of the last token so far, or after it
  int64_t total = 0;               // tokens before this document
  int64_t next = seq_len - after;  // the token of the next row
  for (int64_t d = 0; d < documents; ++d) {
    const int64_t end = total + lengths(d);
    for (; next < end; next += seq_len) rows.push_back({d, next - total + after});
    if (end > total) last = {d, end - total - 1 + after};
    total = end;
  }
  const int64_t usable = total - (extra ? 1 : 0);
  if (keep_last && usable > 0 && usable % seq_len != 0) rows.push_back(last);
  return rows;
}

// Step i draws from the dataset that is furthest behind its share of max(i, 1) samples; ties go to the lowest number.
// A dataset with `capacity` samples drawn is finished; the shares of the others do not change. Calls
// emit(step, dataset, sample of that dataset).
template <class Emit>
void blend(const std::vector<double>& weights, const std::vector<double>& capacity, int64_t steps, Emit emit) {
  const size_t datasets = weights.size();
  std::vector<double> drawn(datasets, 0);  // whole numbers, exact up to 2^53
  for (int64_t step = 0; step < steps; ++step) {
    const double due = std::max<double>(static_cast<double>(step), 1.0);
    double worst = -std::numeric_limits<double>::infinity();
    size_t pick = 0;
    for (size_t d = 0; d < datasets; ++d) {
      const double lag = weights[d] * due - drawn[d];
      if (lag > worst && drawn[d] < capacity[d]) worst = lag, pick = d;
    }
    emit(step, static_cast<int64_t>(pick), static_cast<int64_t>(drawn[pick]));
    drawn[pick] += 1;
  }
}

}  // namespace megalite
