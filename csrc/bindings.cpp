// fastfpl._C: one m.def per entry point. Every tensor is passed as it is and checked here; the work
// runs without the interpreter's lock.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <optional>

#include "attention.h"
#include "dlpack.h"
#include "gate.h"
#include "text.h"
#include "transport.h"

namespace py = pybind11;

namespace {

using fastfpl::bf16;
using fastfpl::View;
using fastfpl::wide;

// A tensor, or None for a null pointer.
class Perhaps {
 public:
  Perhaps(const char* op, const char* name, py::handle tensor, int64_t size) {
    if (tensor.is_none()) return;
    view_.emplace(op, name, tensor);
    view_->need_size(size);
  }
  template <class T>
  T* data() const {
    return view_ ? view_->data<T>() : nullptr;
  }

 private:
  std::optional<View> view_;
};

// Calls work with a null pointer of the tensor's number type.
template <class Work>
void by_type(const View& tensor, const Work& work) {
  if (tensor.is<bf16>())
    work(static_cast<bf16*>(nullptr));
  else if (tensor.is<double>())
    work(static_cast<double*>(nullptr));
  else
    work(static_cast<float*>(nullptr));
}

#define FASTFPL_TYPE(null) std::remove_pointer_t<decltype(null)>

fastfpl::PrefixAttention prefix_attention_of(const char* op, const View& qkv, const View& mixed,
                                             const View& starts, int64_t shared, int64_t heads,
                                             bool last_only, int64_t threads) {
  qkv.need_ndim(3);
  const int64_t groups = qkv.shape(0), rows = qkv.shape(1), width = qkv.shape(2) / 3;
  const int64_t* first = starts.data<int64_t>();
  const int64_t segments = starts.size() - 1;
  if (heads < 1 || qkv.shape(2) != 3 * width || width % heads || width / heads > 128)
    fastfpl::refuse(op, "heads", "cut the width into heads of at most 128", std::to_string(heads));
  if (segments < 1 || first[0] || shared < 0)
    fastfpl::refuse(op, "starts", "begin with 0 and end with the suffix rows", "another list");
  for (int64_t c = 0; c < segments; ++c)
    if (first[c + 1] <= first[c])
      fastfpl::refuse(op, "starts", "rise", std::to_string(first[c + 1]));
  if (shared + first[segments] != rows)
    fastfpl::refuse(op, "starts", "end with " + std::to_string(rows - shared),
                    std::to_string(first[segments]));
  mixed.need_size(groups * (last_only ? segments : rows) * width);
  return {groups, shared, segments, first, heads, width / heads, last_only, threads};
}

void prefix_attention_fwd(py::handle qkv_, py::handle bias_, py::handle sos_, py::handle mixed_,
                          py::handle starts_, int64_t shared, int64_t heads, bool last_only,
                          int64_t threads) {
  const char* op = "prefix_attention_fwd";
  const View qkv(op, "qkv", qkv_), mixed(op, "mixed", mixed_), starts(op, "starts", starts_);
  const auto a = prefix_attention_of(op, qkv, mixed, starts, shared, heads, last_only, threads);
  const Perhaps bias(op, "bias", bias_, 3 * a.heads * a.size);
  const Perhaps sos(op, "sos", sos_, 2 * a.heads * a.size);
  by_type(qkv, [&](auto* null) {
    using T = FASTFPL_TYPE(null);
    T *in = qkv.data<T>(), *out = mixed.data<T>(), *b = bias.data<T>(), *s = sos.data<T>();
    py::gil_scoped_release release;
    fastfpl::prefix_attention_fwd<T>(in, b, s, out, a);
  });
}

void prefix_attention_bwd(py::handle d_mixed_, py::handle qkv_, py::handle bias_, py::handle sos_,
                          py::handle d_qkv_, py::handle starts_, int64_t shared, int64_t heads,
                          bool last_only, int64_t threads) {
  const char* op = "prefix_attention_bwd";
  const View d_mixed(op, "d_mixed", d_mixed_), qkv(op, "qkv", qkv_), d_qkv(op, "d_qkv", d_qkv_);
  const View starts(op, "starts", starts_);
  const auto a = prefix_attention_of(op, qkv, d_mixed, starts, shared, heads, last_only, threads);
  const Perhaps bias(op, "bias", bias_, 3 * a.heads * a.size);
  const Perhaps sos(op, "sos", sos_, 2 * a.heads * a.size);
  d_qkv.need_size(qkv.size());
  by_type(qkv, [&](auto* null) {
    using T = FASTFPL_TYPE(null);
    T *d = d_mixed.data<T>(), *in = qkv.data<T>(), *out = d_qkv.data<T>();
    T *b = bias.data<T>(), *s = sos.data<T>();
    py::gil_scoped_release release;
    fastfpl::prefix_attention_bwd<T>(d, in, b, s, out, a);
  });
}

void norm_fwd(py::handle x_, py::handle weight_, py::handle bias_, py::handle shift_, py::handle h_,
              py::handle base_, py::handle mean_, py::handle rstd_, double eps, int64_t threads) {
  const char* op = "norm_fwd";
  const View x(op, "x", x_), weight(op, "weight", weight_), bias(op, "bias", bias_), h(op, "h", h_);
  const View mean(op, "mean", mean_), rstd(op, "rstd", rstd_);
  x.need_ndim(1);
  const int64_t width = x.shape(-1), rows = mean.size();
  x.need_size(rows * width), h.need_size(rows * width), rstd.need_size(rows);
  weight.need_size(width), bias.need_size(width);
  const Perhaps shift(op, "shift", shift_, width), base(op, "base", base_, rows * width);
  if (shift_.is_none() != base_.is_none())
    fastfpl::refuse(op, "base", "come with shift", "one of both");
  by_type(x, [&](auto* null) {
    using T = FASTFPL_TYPE(null);
    T *in = x.data<T>(), *by = shift.data<T>(), *out = h.data<T>(), *moved = base.data<T>();
    wide<T>*w = weight.data<wide<T>>(), *b = bias.data<wide<T>>();
    wide<T>*m = mean.data<wide<T>>(), *r = rstd.data<wide<T>>();
    py::gil_scoped_release release;
    fastfpl::norm_fwd<T>(in, w, b, by, out, moved, m, r, eps, rows, width, threads);
  });
}

void norm_bwd(py::handle d_h_, py::handle x_, py::handle weight_, py::handle mean_,
              py::handle rstd_, py::handle d_x_, int64_t threads) {
  const char* op = "norm_bwd";
  const View d_h(op, "d_h", d_h_), x(op, "x", x_), weight(op, "weight", weight_);
  const View mean(op, "mean", mean_), rstd(op, "rstd", rstd_), d_x(op, "d_x", d_x_);
  x.need_ndim(1);
  const int64_t width = x.shape(-1), rows = mean.size();
  x.need_size(rows * width), d_h.need_size(rows * width), d_x.need_size(rows * width);
  rstd.need_size(rows), weight.need_size(width);
  by_type(x, [&](auto* null) {
    using T = FASTFPL_TYPE(null);
    T *d = d_h.data<T>(), *in = x.data<T>(), *out = d_x.data<T>();
    wide<T>*w = weight.data<wide<T>>(), *m = mean.data<wide<T>>(), *r = rstd.data<wide<T>>();
    py::gil_scoped_release release;
    fastfpl::norm_bwd<T>(d, in, w, m, r, out, rows, width, threads);
  });
}

fastfpl::Activation activation_of(const char* op, const std::string& kind) {
  if (kind == "quick_gelu") return fastfpl::Activation::kQuickGelu;
  if (kind == "gelu") return fastfpl::Activation::kGelu;
  fastfpl::refuse(op, "kind", "be quick_gelu or gelu", kind);
}

void activation_fwd(py::handle u_, py::handle bias_, py::handle a_, const std::string& kind_,
                    int64_t threads) {
  const char* op = "activation_fwd";
  const View u(op, "u", u_), bias(op, "bias", bias_), a(op, "a", a_);
  const fastfpl::Activation kind = activation_of(op, kind_);
  const int64_t width = bias.size(), rows = width ? u.size() / width : 0;
  u.need_size(rows * width), a.need_size(rows * width);
  by_type(u, [&](auto* null) {
    using T = FASTFPL_TYPE(null);
    T *in = u.data<T>(), *b = bias.data<T>(), *out = a.data<T>();
    py::gil_scoped_release release;
    fastfpl::activation_fwd<T>(in, b, out, kind, rows, width, threads);
  });
}

void activation_bwd(py::handle d_, py::handle u_, py::handle bias_, const std::string& kind_,
                    int64_t threads) {
  const char* op = "activation_bwd";
  const View d(op, "d", d_), u(op, "u", u_), bias(op, "bias", bias_);
  const fastfpl::Activation kind = activation_of(op, kind_);
  const int64_t width = bias.size(), rows = width ? u.size() / width : 0;
  u.need_size(rows * width), d.need_size(rows * width);
  by_type(u, [&](auto* null) {
    using T = FASTFPL_TYPE(null);
    T *out = d.data<T>(), *in = u.data<T>(), *b = bias.data<T>();
    py::gil_scoped_release release;
    fastfpl::activation_bwd<T>(out, in, b, kind, rows, width, threads);
  });
}

void unit_fwd(py::handle y_, py::handle f_, py::handle norm_, int64_t threads) {
  const char* op = "unit_fwd";
  const View y(op, "y", y_), f(op, "f", f_), norm(op, "norm", norm_);
  y.need_ndim(1);
  const int64_t width = y.shape(-1), rows = norm.size();
  y.need_size(rows * width), f.need_size(rows * width);
  by_type(y, [&](auto* null) {
    using T = FASTFPL_TYPE(null);
    T *in = y.data<T>(), *out = f.data<T>();
    wide<T>* n = norm.data<wide<T>>();
    py::gil_scoped_release release;
    fastfpl::unit_fwd<T>(in, out, n, rows, width, threads);
  });
}

void unit_bwd(py::handle d_f_, py::handle f_, py::handle norm_, py::handle d_y_, int64_t threads) {
  const char* op = "unit_bwd";
  const View d_f(op, "d_f", d_f_), f(op, "f", f_), norm(op, "norm", norm_), d_y(op, "d_y", d_y_);
  f.need_ndim(1);
  const int64_t width = f.shape(-1), rows = norm.size();
  f.need_size(rows * width), d_f.need_size(rows * width), d_y.need_size(rows * width);
  by_type(f, [&](auto* null) {
    using T = FASTFPL_TYPE(null);
    T *d = d_f.data<T>(), *in = f.data<T>(), *out = d_y.data<T>();
    wide<T>* n = norm.data<wide<T>>();
    py::gil_scoped_release release;
    fastfpl::unit_bwd<T>(d, in, n, out, rows, width, threads);
  });
}
#undef FASTFPL_TYPE

template <class Real>
int64_t transport_plan_of(const fastfpl::View& sim, const fastfpl::View& plan,
                          const fastfpl::View& iterations, const fastfpl::View& residual,
                          const Perhaps& rows, const Perhaps& columns, const Perhaps& logits,
                          const fastfpl::Transport& t) {
  const fastfpl::Arrays<Real> arrays{sim.data<Real>(),
                                     rows.data<Real>(),
                                     columns.data<Real>(),
                                     plan.data<Real>(),
                                     logits.data<Real>(),
                                     iterations.data<int64_t>(),
                                     residual.data<Real>()};
  py::gil_scoped_release release;
  return fastfpl::transport_plan(arrays, t);
}

int64_t transport_plan(py::handle sim_, py::handle plan_, py::handle iterations_,
                       py::handle residual_, double eps, double mass, bool balanced,
                       int64_t max_iter, double tol, int64_t threads, py::handle rows_,
                       py::handle columns_, py::handle logits_, int64_t classes) {
  const char* op = "transport_plan";
  const fastfpl::View sim(op, "sim", sim_), plan(op, "plan", plan_);
  const fastfpl::View iterations(op, "iterations", iterations_),
      residual(op, "residual", residual_);
  sim.need_ndim(classes > 0 ? 3 : 2);
  const int64_t patches = sim.shape(classes > 0 ? -3 : -2), prompts = sim.shape(-1);
  if (patches < 1) fastfpl::refuse(op, "sim", "have patches", std::to_string(patches));
  if (prompts < 1 || prompts > fastfpl::kMostPrompts)
    fastfpl::refuse(op, "sim", "have 1 to " + std::to_string(fastfpl::kMostPrompts) + " prompts",
                    std::to_string(prompts));
  const int64_t problems = sim.size() / (patches * prompts);
  plan.need_size(sim.size());
  iterations.need_size(problems);
  residual.need_size(problems);
  const Perhaps rows(op, "rows", rows_, problems * patches);
  const Perhaps columns(op, "columns", columns_, problems * prompts);
  const Perhaps logits(op, "logits", logits_, problems);
  if (rows_.is_none() != columns_.is_none())
    fastfpl::refuse(op, "columns", "come with rows", "one of both");
  // their logarithms become a part of the similarities that a score would be summed from
  if (!rows_.is_none() && !logits_.is_none())
    fastfpl::refuse(op, "logits", "come without rows", "both");
  if (classes > 0 && sim.size() && sim.shape(-2) != classes)
    fastfpl::refuse(op, "sim", "have " + std::to_string(classes) + " classes",
                    std::to_string(sim.shape(-2)));
  const int64_t each = std::max<int64_t>(classes, 1);
  const fastfpl::Transport t{problems / each, each, patches,  prompts,  eps,
                             mass,            tol,  balanced, max_iter, threads};
  return sim.is<double>()
             ? transport_plan_of<double>(sim, plan, iterations, residual, rows, columns, logits, t)
             : transport_plan_of<float>(sim, plan, iterations, residual, rows, columns, logits, t);
}

template <class Real>
void weigh_plan_of(const fastfpl::View& plan, const fastfpl::View& by, const fastfpl::View& out,
                   int64_t threads) {
  const Real* in = plan.data<Real>();
  const Real* factors = by.data<Real>();
  Real* weighted = out.data<Real>();
  const int64_t patches = plan.shape(-3), classes = plan.shape(-2), prompts = plan.shape(-1);
  const int64_t images = plan.size() ? plan.size() / (patches * classes * prompts) : 0;
  py::gil_scoped_release release;
  fastfpl::weigh_plan(in, factors, weighted, images, patches, classes, prompts, threads);
}

void weigh_plan(py::handle plan_, py::handle by_, py::handle out_, int64_t threads) {
  const char* op = "weigh_plan";
  const fastfpl::View plan(op, "plan", plan_), by(op, "by", by_), out(op, "out", out_);
  plan.need_ndim(3);
  out.need_size(plan.size());
  if (plan.size()) by.need_size(plan.size() / (plan.shape(-3) * plan.shape(-1)));
  if (plan.is<double>())
    weigh_plan_of<double>(plan, by, out, threads);
  else
    weigh_plan_of<float>(plan, by, out, threads);
}

// Sizes of qz (U, 2, H, d, B) and kv (U, C, E, 2, H, d), which must agree.
fastfpl::Gate gate_of(const char* op, const View& qz, const View& kv, double scale,
                      int64_t threads) {
  qz.need_ndim(5), kv.need_ndim(6);
  const fastfpl::Gate g{kv.shape(0), kv.shape(1), kv.shape(2), kv.shape(4),
                        kv.shape(5), qz.shape(4), scale,       threads};
  const int64_t lanes = fastfpl::gate_padded(1, kv.is<double>() ? 8 : 4);
  if (g.images % lanes)
    fastfpl::refuse(op, "qz", "have a multiple of " + std::to_string(lanes) + " images",
                    std::to_string(g.images));
  if (g.experts < 1) fastfpl::refuse(op, "kv", "have experts", std::to_string(g.experts));
  kv.need_size(g.clients * g.classes * g.experts * 2 * g.heads * g.width);
  qz.need_size(g.clients * 2 * g.heads * g.width * g.images);
  return g;
}

template <class Real>
void gate_fwd_of(const View& qz, const View& kv, const View& logits, const Perhaps& stats,
                 const fastfpl::Gate& g) {
  Real *in = qz.data<Real>(), *with = kv.data<Real>();
  Real *out = logits.data<Real>(), *kept = stats.data<Real>();
  py::gil_scoped_release release;
  fastfpl::gate_fwd<Real>(in, with, out, kept, g);
}

void gate_fwd(py::handle qz_, py::handle kv_, py::handle logits_, py::handle stats_, double scale,
              int64_t threads) {
  const char* op = "gate_fwd";
  const View qz(op, "qz", qz_), kv(op, "kv", kv_), logits(op, "logits", logits_);
  const fastfpl::Gate g = gate_of(op, qz, kv, scale, threads);
  const int64_t softmaxes = g.clients * g.classes * g.heads * g.images;
  const Perhaps stats(op, "stats", stats_, 3 * softmaxes);
  logits.need_size(g.clients * g.classes * g.images);
  kv.is<double>() ? gate_fwd_of<double>(qz, kv, logits, stats, g)
                  : gate_fwd_of<float>(qz, kv, logits, stats, g);
}

template <class Real>
void gate_bwd_of(const View& d_logits, const View& qz, const Perhaps& rows, const View& kv,
                 const View& stats, const Perhaps& d_qz, const Perhaps& d_kv, int64_t chunks,
                 const fastfpl::Gate& g) {
  Real *by = d_logits.data<Real>(), *in = qz.data<Real>(), *with = kv.data<Real>();
  Real *again = rows.data<Real>(), *kept = stats.data<Real>();
  Real *of_qz = d_qz.data<Real>(), *of_kv = d_kv.data<Real>();
  py::gil_scoped_release release;
  fastfpl::gate_bwd<Real>(by, in, again, with, kept, of_qz, of_kv, chunks, g);
}

void gate_bwd(py::handle d_logits_, py::handle qz_, py::handle rows_, py::handle kv_,
              py::handle stats_, py::handle d_qz_, py::handle d_kv_, double scale, int64_t chunks,
              int64_t threads) {
  const char* op = "gate_bwd";
  const View d_logits(op, "d_logits", d_logits_), stats(op, "stats", stats_);
  const View qz(op, "qz", qz_), kv(op, "kv", kv_);
  const fastfpl::Gate g = gate_of(op, qz, kv, scale, threads);
  if (chunks < 1) fastfpl::refuse(op, "chunks", "be positive", std::to_string(chunks));
  d_logits.need_size(g.clients * g.classes * g.images);
  stats.need_size(3 * g.clients * g.classes * g.heads * g.images);
  const int64_t padded = fastfpl::gate_padded(g.width, kv.is<double>() ? 8 : 4);
  const Perhaps rows(op, "rows", rows_, g.clients * 2 * g.heads * g.images * padded);
  const Perhaps d_qz(op, "d_qz", d_qz_, chunks * qz.size()), d_kv(op, "d_kv", d_kv_, kv.size());
  if (rows_.is_none() && !d_kv_.is_none())
    fastfpl::refuse(op, "rows", "come with d_kv", "None");
  kv.is<double>() ? gate_bwd_of<double>(d_logits, qz, rows, kv, stats, d_qz, d_kv, chunks, g)
                  : gate_bwd_of<float>(d_logits, qz, rows, kv, stats, d_qz, d_kv, chunks, g);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled faces of fastfpl's ops for the CPU.";
  m.def("prefix_attention_fwd", &prefix_attention_fwd);
  m.def("prefix_attention_bwd", &prefix_attention_bwd);
  m.def("norm_fwd", &norm_fwd);
  m.def("norm_bwd", &norm_bwd);
  m.def("activation_fwd", &activation_fwd);
  m.def("activation_bwd", &activation_bwd);
  m.def("unit_fwd", &unit_fwd);
  m.def("unit_bwd", &unit_bwd);
  m.def("gate_fwd", &gate_fwd, py::arg("qz"), py::arg("kv"), py::arg("logits"), py::arg("stats"),
        py::arg("scale"), py::arg("threads"));
  m.def("gate_bwd", &gate_bwd, py::arg("d_logits"), py::arg("qz"), py::arg("rows"), py::arg("kv"),
        py::arg("stats"), py::arg("d_qz"), py::arg("d_kv"), py::arg("scale"), py::arg("chunks"),
        py::arg("threads"));
  m.def("transport_plan", &transport_plan, py::arg("sim"), py::arg("plan"), py::arg("iterations"),
        py::arg("residual"), py::arg("eps"), py::arg("mass"), py::arg("balanced"),
        py::arg("max_iter"), py::arg("tol"), py::arg("threads"), py::arg("rows") = py::none(),
        py::arg("columns") = py::none(), py::arg("logits") = py::none(), py::arg("classes") = 0);
  m.def("weigh_plan", &weigh_plan, py::arg("plan"), py::arg("by"), py::arg("out"),
        py::arg("threads"));
  m.attr("most_prompts") = fastfpl::kMostPrompts;
}
