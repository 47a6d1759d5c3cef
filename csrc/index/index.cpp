// Python bindings of the index reader and builders.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <numeric>

#include "builders.h"
#include "reader.h"

namespace py = pybind11;

namespace megalite {
namespace {

using Ints = py::array_t<int64_t>;

// A read-only array over mapped memory that keeps its Reader alive.
py::array table(const py::object& reader, const char* dtype, int64_t count, const char* data) {
  const py::dtype type(dtype);
  py::array view(type, {count}, {type.itemsize()}, data, reader);
  view.attr("setflags")(py::arg("write") = false);
  return view;
}

py::array copy_tokens(const Reader& reader, int64_t byte, int64_t count) {
  py::array out(py::dtype(reader.type.name), std::vector<py::ssize_t>{count});
  void* to = out.mutable_data();
  const py::gil_scoped_release unlocked;
  reader.read(to, byte, count * reader.type.size);
  return out;
}

py::array tokens(const Reader& reader, int64_t start, int64_t stop) {
  reader.require_contiguous();
  if (start < 0 || start > stop || stop > reader.num_tokens) {
    throw py::index_error("tokens [" + std::to_string(start) + ", " + std::to_string(stop) +
                          ") are outside the stream of " + std::to_string(reader.num_tokens) + " tokens");
  }
  return copy_tokens(reader, start * reader.type.size, stop - start);
}

py::array sequence(const Reader& reader, int64_t i) {
  const int64_t at = i < 0 ? i + reader.num_sequences : i;
  if (at < 0 || at >= reader.num_sequences) {
    throw py::index_error("sequence " + std::to_string(i) + " is outside the " + std::to_string(reader.num_sequences) +
                          " sequences");
  }
  return copy_tokens(reader, reader.offset(at), reader.length(at));
}

Ints build_sample_idx(const py::array_t<int32_t, py::array::c_style>& lengths,
                      const py::array_t<int64_t, py::array::c_style>& order, int64_t seq_len, bool extra_token,
                      bool keep_last) {
  if (lengths.ndim() != 1 || order.ndim() != 1) throw py::value_error("lengths and order must be one-dimensional");
  // Views of a mapped index are unaligned: load() handles that.
  const void *length_data = lengths.data(), *order_data = order.data();
  const int64_t documents = lengths.size(), ordered = order.size();
  std::vector<Place> rows;
  {
    const py::gil_scoped_release unlocked;
    const auto length_of = [&](int64_t position) -> int64_t {
      // A shuffled order misses the cache at every document unless the lengths ahead are prefetched.
      constexpr int64_t kAhead = 32;
      if (position + kAhead < ordered) {
        const int64_t ahead = load<int64_t>(order_data, position + kAhead);
        __builtin_prefetch(static_cast<const int32_t*>(length_data) + ahead);
      }
      const int64_t document = load<int64_t>(order_data, position);
      if (document < 0 || document >= documents) {
        throw std::invalid_argument("order[" + std::to_string(position) + "]=" + std::to_string(document) +
                                    " is not one of the " + std::to_string(documents) + " documents");
      }
      const int64_t length = load<int32_t>(length_data, document);
      if (length < 0) throw std::invalid_argument("document " + std::to_string(document) + " has a negative length");
      return length;
    };
    rows = sample_index(ordered, length_of, seq_len, extra_token, keep_last);
  }
  Ints out({static_cast<int64_t>(rows.size()), int64_t{2}});
  std::memcpy(out.mutable_data(), rows.data(), rows.size() * sizeof(Place));
  return out;
}

py::tuple blended(const std::vector<double>& weights, const std::vector<double>& capacity, int64_t size) {
  Ints datasets(size), samples(size);
  int64_t *dataset = datasets.mutable_data(), *sample = samples.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    blend(weights, capacity, size, [=](int64_t step, int64_t d, int64_t s) { dataset[step] = d, sample[step] = s; });
  }
  return py::make_tuple(datasets, samples);
}

py::tuple build_blending_indices(const std::vector<double>& weights, int64_t size) {
  const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
  // At ties, a dataset of weight 0 would sometimes be drawn.
  const bool positive = std::all_of(weights.begin(), weights.end(), [](double w) { return w > 0; });
  if (weights.empty() || !positive || !(std::abs(sum - 1) <= 1e-6)) {
    throw py::value_error("blending weights must be above 0 and sum to 1, their sum is " + std::to_string(sum) +
                          "; divide them by their sum and remove datasets of weight 0");
  }
  if (size < 0) throw py::value_error("size=" + std::to_string(size) + " must be 0 or more");
  return blended(weights, std::vector<double>(weights.size(), std::numeric_limits<double>::infinity()), size);
}

py::tuple build_exhaustive_blending_indices(const std::vector<int64_t>& sizes) {
  for (const int64_t size : sizes) {
    if (size < 0) throw py::value_error("dataset size " + std::to_string(size) + " must be 0 or more");
  }
  const int64_t total = std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
  std::vector<double> weights(sizes.size());
  std::transform(sizes.begin(), sizes.end(), weights.begin(),
                 [=](int64_t size) { return static_cast<double>(size) / static_cast<double>(total); });
  return blended(weights, std::vector<double>(sizes.begin(), sizes.end()), total);
}

}  // namespace
}  // namespace megalite

PYBIND11_MODULE(_index, m) {
  using namespace megalite;
  using namespace pybind11::literals;
  m.doc() = "Reader of Megatron-LM's indexed token files, and builders of its sample and blending indices.";

  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const std::system_error& failed) {
      PyErr_SetString(PyExc_OSError, failed.what());
    }
  });

  py::class_<Reader>(m, "Reader", R"(Reads prefix.{bin,idx}; checks the whole index when it is opened.

dtype; num_sequences, num_documents, num_tokens; and three read-only arrays over the mapped index, which keep the
reader alive: lengths [num_sequences] in tokens, offsets [num_sequences] in bytes, documents [num_documents + 1], the
first sequence of each document. Tokens are read with pread, so truncating the .bin file while it is in use raises
ValueError. Truncating the .idx file while it is mapped kills the process with SIGBUS.

Raises ValueError if a file is missing, truncated or damaged.)")
      .def(py::init<const std::string&>(), "prefix"_a)
      .def_property_readonly("dtype", [](const Reader& r) { return py::dtype(r.type.name); })
      .def_readonly("num_sequences", &Reader::num_sequences)
      .def_property_readonly("num_documents", [](const Reader& r) { return r.num_boundaries - 1; })
      .def_readonly("num_tokens", &Reader::num_tokens)
      .def_property_readonly("lengths",
                             [](const py::object& self) {
                               const auto& r = self.cast<const Reader&>();
                               return table(self, "<i4", r.num_sequences, r.lengths());
                             })
      .def_property_readonly("offsets",
                             [](const py::object& self) {
                               const auto& r = self.cast<const Reader&>();
                               return table(self, "<i8", r.num_sequences, r.offsets());
                             })
      .def_property_readonly("documents",
                             [](const py::object& self) {
                               const auto& r = self.cast<const Reader&>();
                               return table(self, "<i8", r.num_boundaries, r.documents());
                             })
      .def_property_readonly("contiguous", &Reader::contiguous, "Whether sequences are back to back in order.")
      .def("__len__", [](const Reader& r) { return r.num_sequences; })
      .def("__getitem__", &sequence, "sequence"_a, "Return a copy of one sequence's tokens.")
      .def("tokens", &tokens, "start"_a, "stop"_a, "Return a copy of tokens [start, stop) of the flat stream.")
      .def("max_token", &Reader::max_token, py::call_guard<py::gil_scoped_release>(),
           "Return the largest token id, -1 for an empty stream; reads the whole .bin file.");

  m.def("build_sample_idx", &build_sample_idx, "lengths"_a, "order"_a, "seq_len"_a, "extra_token"_a = true,
        "keep_last"_a = false, R"(Return the boundaries of samples of seq_len tokens: int64 [num_samples + 1, 2].

lengths: int32, tokens of each document; order: document numbers in sequence, over all epochs. A row is (position in
order, token offset in that document); sample k runs from row k to row k + 1. extra_token: each sample also covers the
first token of the next (its last label). keep_last: keep a shorter sample at the end. Data too short for one sample
returns the single row (0, 0).

Raises ValueError if an entry of order is outside lengths or seq_len < 1.)");
  m.def("build_blending_indices", &build_blending_indices, "weights"_a, "size"_a,
        R"(Mix datasets by weight; return (dataset of each step, its sample number), both int64 [size].

Step i takes the dataset with the largest weight · max(i, 1) - samples drawn so far, ties to the lowest number. Sample
numbers are unbounded. Raises ValueError if weights are not positive or do not sum to 1.)");
  m.def("build_exhaustive_blending_indices", &build_exhaustive_blending_indices, "sizes"_a,
        R"(The same with weights size / total, each dataset used exactly once: both int64 [sum of sizes].)");
}
