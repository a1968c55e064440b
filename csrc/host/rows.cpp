// Operators on rows of logits[N, C].
#include <atomic>

#include "checks.h"

namespace fastfisher {
namespace {

void check_logits(const Tensor& logits) {
  check(logits.dim() == 2, "logits: expected 2 dimensions (N, C), got ", logits.dim());
  const int64_t columns = logits.size(1);
  check(columns >= 1 && columns <= kMaxColumns, "logits: expected 1 to ", kMaxColumns, " classes, got ", columns);
}

// Calls run(begin, end) on ranges of so many rows. Each returns its lowest row that cannot be served, or -1; the result
// is the lowest of all, or -1.
template <class Function>
int64_t lowest_bad(int64_t rows, int64_t rows_per_task, Function run) {
  std::atomic<int64_t> lowest{rows};
  parallel_for(0, rows, rows_per_task, [&](int64_t begin, int64_t end) {
    const int64_t bad = run(begin, end);
    if (bad < 0) return;
    int64_t seen = lowest.load();
    while (bad < seen && !lowest.compare_exchange_weak(seen, bad)) {
    }
  });
  return lowest.load() == rows ? -1 : lowest.load();
}

// The same for rows that need a softmax: one without is an error.
template <class Function>
void over_rows(int64_t rows, int64_t columns, Function run) {
  const int64_t bad = lowest_bad(rows, rows_per_task(columns), run);
  check(bad < 0, "logits: row ", bad, " has no softmax (it holds NaN or +inf, or nothing above -inf)");
}

// ---- sample_cross_entropy -------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> sample_cross_entropy(const Tensor& logits, const Tensor& key, double scale,
                                                        int64_t first) {
  check_logits(logits);
  check(scale != 0, "scale: expected a number other than 0");
  const Type type = type_of(logits, "logits");
  const Key seed = key_of(key);
  const Tensor x = dense(logits);
  const int64_t rows = x.size(0), columns = x.size(1);
  Tensor nll = empty({rows}, type == Type::f64 ? ScalarType::Double : ScalarType::Float);
  Tensor labels = empty({rows}, ScalarType::Long), dlogits = empty({rows, columns}, x.scalar_type());
  const void* source = read(x);
  void *losses = write(nll), *gradient = write(dlogits);
  auto* drawn = write<int64_t>(labels);
  over_rows(rows, columns, [&](int64_t begin, int64_t end) {
    return kernels().sample_cross_entropy(type, source, columns, seed, static_cast<uint64_t>(first), scale, losses,
                                          drawn, gradient, begin, end);
  });
  return {nll, labels, dlogits};
}

OPERATOR(sample_cross_entropy,
         "(Tensor logits, Tensor key, float scale, int first=0) -> (Tensor nll, Tensor labels, Tensor dlogits)")

// ---- softmax_hessian_product ----------------------------------------------------------------------------------------

Tensor softmax_hessian_product(const Tensor& dlogits, const Tensor& labels, const Tensor& vector, double scale) {
  check(dlogits.dim() == 2, "dlogits: expected 2 dimensions (N, C), got ", dlogits.dim());
  check_same(dlogits, "dlogits", vector, "vector");
  check(labels.scalar_type() == ScalarType::Long && labels.numel() == dlogits.size(0),
        "labels: expected one int64 label per row");
  const Type type = type_of(dlogits, "dlogits");
  const int64_t rows = dlogits.size(0), columns = dlogits.size(1);
  const Tensor gradient = dense(dlogits), v = dense(vector), drawn = dense(labels);
  const auto* label = read<int64_t>(drawn);
  for (int64_t i = 0; i < rows; ++i)
    check(label[i] >= 0 && label[i] < columns, "labels: row ", i, " holds ", label[i], ", expected 0 to ", columns - 1);
  Tensor out = empty({rows, columns}, dlogits.scalar_type());
  const void *d = read(gradient), *source = read(v);
  void* target = write(out);
  parallel_for(0, rows, rows_per_task(columns), [&](int64_t begin, int64_t end) {
    kernels().softmax_hessian_product(type, d, label, source, columns, scale, target, begin, end);
  });
  return out;
}

OPERATOR(softmax_hessian_product, "(Tensor dlogits, Tensor labels, Tensor vector, float scale) -> Tensor")

// ---- rademacher_cotangent -------------------------------------------------------------------------------------------

Tensor rademacher_cotangent(const Tensor& logits, const Tensor& key, double scale, int64_t first) {
  check_logits(logits);
  const Type type = type_of(logits, "logits");
  const Key seed = key_of(key);
  const Tensor x = dense(logits);
  const int64_t rows = x.size(0), columns = x.size(1);
  Tensor out = empty({rows, columns}, x.scalar_type());
  const void* source = read(x);
  void* target = write(out);
  over_rows(rows, columns, [&](int64_t begin, int64_t end) {
    return kernels().rademacher_cotangent(type, source, columns, seed, static_cast<uint64_t>(first), scale, target,
                                          begin, end);
  });
  return out;
}

OPERATOR(rademacher_cotangent, "(Tensor logits, Tensor key, float scale, int first=0) -> Tensor")

// ---- sample_binary_cross_entropy ------------------------------------------------------------------------------------

// The indices of an element of a contiguous tensor, as in [3, 17].
std::string indices_of(const Tensor& tensor, int64_t element) {
  std::string text;
  for (int64_t d = tensor.dim() - 1; d >= 0; --d) {
    text = std::to_string(element % tensor.size(d)) + (text.empty() ? "" : ", ") + text;
    element /= tensor.size(d);
  }
  return "[" + text + "]";
}

std::tuple<Tensor, Tensor, Tensor> sample_binary_cross_entropy(const Tensor& logits, const Tensor& key, double scale,
                                                               int64_t first) {
  check(scale != 0, "scale: expected a number other than 0");
  check(first >= 0, "first: expected 0 or more, got ", first);
  const Type type = type_of(logits, "logits");
  const Key seed = key_of(key);
  const Tensor x = dense(logits);
  const Tensor nll = empty_like(x, type == Type::f64 ? ScalarType::Double : ScalarType::Float);
  const Tensor labels = empty_like(x, x.scalar_type()), dlogits = empty_like(x, x.scalar_type());
  const void* source = read(x);
  void *losses = write(nll), *drawn = write(labels), *gradient = write(dlogits);
  const int64_t bad = lowest_bad(x.numel(), kGrain, [&](int64_t begin, int64_t end) {
    return kernels().sample_binary_cross_entropy(type, source, seed, static_cast<uint64_t>(first), scale, losses, drawn,
                                                 gradient, begin, end);
  });
  check(bad < 0, "logits: expected no NaN, got one at ", bad < 0 ? "" : indices_of(x, bad));
  return {nll, labels, dlogits};
}

OPERATOR(sample_binary_cross_entropy,
         "(Tensor logits, Tensor key, float scale, int first=0) -> (Tensor nll, Tensor labels, Tensor dlogits)")

}  // namespace
}  // namespace fastfisher
