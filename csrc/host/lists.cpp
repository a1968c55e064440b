// Operators on whole lists of tensors: one parallel loop covers them all. Everything is checked before anything is
// written.
#include "checks.h"

namespace fastfisher {
namespace {

// A piece of one tensor of a list.
struct Piece {
  size_t tensor;
  int64_t begin, end;
};

// The pieces' size is fixed, so that the order of a sum is.
std::vector<Piece> pieces_of(const std::vector<Tensor>& tensors) {
  constexpr int64_t size = 1 << 16;
  std::vector<Piece> pieces;
  for (size_t i = 0; i < tensors.size(); ++i)
    for (int64_t begin = 0; begin < tensors[i].numel(); begin += size)
      pieces.push_back({i, begin, std::min(tensors[i].numel(), begin + size)});
  return pieces;
}

template <class Function>
void for_each_piece(const std::vector<Piece>& pieces, Function use) {
  parallel_for(0, pieces.size(), 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) use(p);
  });
}

// Sums what each piece gives, in the order of the pieces: the same bits for any number of threads.
template <class Function>
Tensor reduce(const std::vector<Tensor>& tensors, Function piece_sum) {
  const auto pieces = pieces_of(tensors);
  std::vector<double> partial(pieces.size());
  for_each_piece(pieces, [&](int64_t p) { partial[p] = piece_sum(pieces[p]); });
  Tensor out = empty({}, ScalarType::Double);
  double sum = 0;
  for (const double value : partial) sum += value;
  *write<double>(out) = sum;
  return out;
}

std::vector<Tensor> dense_list(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> list;
  for (const auto& tensor : tensors) {
    type_of(tensor, "tensors");
    list.push_back(dense(tensor));
  }
  return list;
}

// ---- axpy_diff ------------------------------------------------------------------------------------------------------

Tensor axpy_diff(const std::vector<Tensor>& out, const std::vector<Tensor>& a, const std::vector<Tensor>& b,
                 const Tensor& scale) {
  check(scale.numel() == 1 && scale.scalar_type() == ScalarType::Double, "scale: expected a float64 scalar");
  const double factor = *read<double>(scale);
  check(out.size() == a.size() && out.size() == b.size(), "out, a and b: expected lists of one length, got ",
        out.size(), ", ", a.size(), " and ", b.size());
  for (size_t i = 0; i < out.size(); ++i) {
    check_same(out[i], "out", a[i], "a");
    check_same(out[i], "out", b[i], "b");
    type_of(out[i], "out");
    check(out[i].is_contiguous() && a[i].is_contiguous() && b[i].is_contiguous(),
          "out, a and b: expected contiguous tensors, tensor ", i, " is not");
  }
  return reduce(out, [&](const Piece& piece) {
    const auto& [i, begin, end] = piece;
    return kernels().axpy_diff(type_of(out[i], "out"), write(out[i]), read(a[i]), read(b[i]), factor, begin, end);
  });
}

OPERATOR(axpy_diff, "(Tensor(a!)[] out, Tensor[] a, Tensor[] b, Tensor scale) -> Tensor")

// ---- sum_squares ----------------------------------------------------------------------------------------------------

Tensor sum_squares(const std::vector<Tensor>& tensors) {
  check(!tensors.empty(), "tensors: expected at least one tensor");
  const auto list = dense_list(tensors);
  return reduce(list, [&](const Piece& piece) {
    const auto& [i, begin, end] = piece;
    return kernels().sum_squares(type_of(list[i], "tensors"), read(list[i]), begin, end);
  });
}

OPERATOR(sum_squares, "(Tensor[] tensors) -> Tensor")

// ---- probe_dot, perturb ---------------------------------------------------------------------------------------------

Distribution distribution_of(const std::string& name) {
  check(name == "gaussian" || name == "rademacher", "distribution: expected \"gaussian\" or \"rademacher\", got \"",
        name, "\"");
  return name == "gaussian" ? Distribution::gaussian : Distribution::rademacher;
}

// The index over the whole list of each tensor's first element.
std::vector<uint64_t> offsets_of(const std::vector<Tensor>& tensors, int64_t first) {
  check(first >= 0, "first: expected 0 or more, got ", first);
  std::vector<uint64_t> offsets;
  uint64_t next = static_cast<uint64_t>(first);
  for (const auto& tensor : tensors) {
    offsets.push_back(next);
    next += static_cast<uint64_t>(tensor.numel());
  }
  return offsets;
}

Tensor probe_dot(const std::vector<Tensor>& tensors, const Tensor& key, std::string distribution, int64_t first) {
  const auto kind = distribution_of(distribution);
  const Key seed = key_of(key);
  const auto offsets = offsets_of(tensors, first);
  const auto list = dense_list(tensors);
  return reduce(list, [&](const Piece& piece) {
    const auto& [i, begin, end] = piece;
    return kernels().probe_dot(type_of(list[i], "tensors"), read(list[i]), seed, kind, offsets[i], begin, end);
  });
}

void perturb(const std::vector<Tensor>& out, const std::vector<Tensor>& tensors, const Tensor& key, double eps,
             std::string distribution, int64_t first) {
  const auto kind = distribution_of(distribution);
  const Key seed = key_of(key);
  check(tensors.empty() || tensors.size() == out.size(), "out and tensors: expected lists of one length, got ",
        out.size(), " and ", tensors.size());
  for (size_t i = 0; i < out.size(); ++i) {
    type_of(out[i], "out");
    check(out[i].is_contiguous(), "out: expected contiguous tensors, tensor ", i, " is not");
    if (tensors.empty()) continue;
    check_same(out[i], "out", tensors[i], "tensors");
    check(tensors[i].is_contiguous(), "tensors: expected contiguous tensors, tensor ", i, " is not");
  }
  const auto offsets = offsets_of(out, first);
  const auto pieces = pieces_of(out);
  for_each_piece(pieces, [&](int64_t p) {
    const auto& [i, begin, end] = pieces[p];
    const void* source = tensors.empty() ? nullptr : read(tensors[i]);
    kernels().perturb(type_of(out[i], "out"), write(out[i]), source, seed, eps, kind, offsets[i], begin, end);
  });
}

OPERATOR(probe_dot, "(Tensor[] tensors, Tensor key, str distribution, int first=0) -> Tensor")
OPERATOR(perturb, "(Tensor(a!)[] out, Tensor[] tensors, Tensor key, float eps, str distribution, int first=0) -> ()")

}  // namespace
}  // namespace fastfisher
