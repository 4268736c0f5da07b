// fastfpl._C: one m.def per entry point. Every tensor is passed as it is and checked here; the work
// runs without the interpreter's lock.
#include <pybind11/pybind11.h>

#include <optional>

#include "dlpack.h"
#include "gate.h"
#include "transport.h"

namespace py = pybind11;

namespace {

template <class Real>
int64_t transport_plan_of(const fastfpl::View& sim, const fastfpl::View& plan,
                          const fastfpl::View& iterations, const fastfpl::View& residual,
                          const fastfpl::Transport& t) {
  const Real* in = sim.data<Real>();
  Real* out = plan.data<Real>();
  int64_t* count = iterations.data<int64_t>();
  Real* miss = residual.data<Real>();
  py::gil_scoped_release release;
  return fastfpl::transport_plan(in, out, count, miss, t);
}

int64_t transport_plan(py::handle sim_, py::handle plan_, py::handle iterations_,
                       py::handle residual_, double eps, double mass, bool balanced,
                       int64_t max_iter, double tol, int64_t threads) {
  const char* op = "transport_plan";
  const fastfpl::View sim(op, "sim", sim_), plan(op, "plan", plan_);
  const fastfpl::View iterations(op, "iterations", iterations_),
      residual(op, "residual", residual_);
  sim.need_ndim(2);
  const int64_t patches = sim.shape(-2), prompts = sim.shape(-1);
  if (patches < 1) fastfpl::refuse(op, "sim", "have patches", std::to_string(patches));
  if (prompts < 1 || prompts > 2)
    fastfpl::refuse(op, "sim", "have 1 or 2 prompts", std::to_string(prompts));
  const int64_t problems = sim.size() / (patches * prompts);
  plan.need_size(sim.size());
  iterations.need_size(problems);
  residual.need_size(problems);
  const fastfpl::Transport t{problems, patches,  prompts,  eps,    mass,
                             tol,      balanced, max_iter, threads};
  return sim.is<double>() ? transport_plan_of<double>(sim, plan, iterations, residual, t)
                          : transport_plan_of<float>(sim, plan, iterations, residual, t);
}

// A tensor that may be None.
std::optional<fastfpl::View> given(const char* op, const char* name, py::handle tensor) {
  if (tensor.is_none()) return std::nullopt;
  return fastfpl::View(op, name, tensor);
}

template <class Real>
Real* data_of(const std::optional<fastfpl::View>& view) {
  return view ? view->data<Real>() : nullptr;
}

// Sizes of qz (U, 2, H, d, B) and kv (U, C, E, 2, H, d), which must agree.
fastfpl::Gate gate_of(const char* op, const fastfpl::View& qz, const fastfpl::View& kv,
                      double scale, int64_t threads) {
  qz.need_ndim(5);
  kv.need_ndim(6);
  const fastfpl::Gate g{kv.shape(0), kv.shape(1), kv.shape(2), kv.shape(4),
                        kv.shape(5), qz.shape(4), scale,       threads};
  const int64_t lanes = kv.is<double>() ? fastfpl::gate_lanes<double>()
                                        : fastfpl::gate_lanes<float>();
  if (g.images % lanes)
    fastfpl::refuse(op, "qz", "have a multiple of " + std::to_string(lanes) + " images",
                    std::to_string(g.images));
  if (g.experts < 1) fastfpl::refuse(op, "kv", "have experts", std::to_string(g.experts));
  kv.need_size(g.clients * g.classes * g.experts * 2 * g.heads * g.width);
  qz.need_size(g.clients * 2 * g.heads * g.width * g.images);
  return g;
}

template <class Real>
void gate_fwd_of(const fastfpl::View& qz, const fastfpl::View& kv, const fastfpl::View& logits,
                 const std::optional<fastfpl::View>& stats, const fastfpl::Gate& g) {
  const Real *in = qz.data<Real>(), *with = kv.data<Real>();
  Real *out = logits.data<Real>(), *kept = data_of<Real>(stats);
  py::gil_scoped_release release;
  fastfpl::gate_fwd(in, with, out, kept, g);
}

void gate_fwd(py::handle qz_, py::handle kv_, py::handle logits_, py::handle stats_, double scale,
              int64_t threads) {
  const char* op = "gate_fwd";
  const fastfpl::View qz(op, "qz", qz_), kv(op, "kv", kv_), logits(op, "logits", logits_);
  const auto stats = given(op, "stats", stats_);
  const fastfpl::Gate g = gate_of(op, qz, kv, scale, threads);
  logits.need_size(g.clients * g.classes * g.images);
  if (stats) stats->need_size(g.clients * g.classes * g.heads * 3 * g.images);
  kv.is<double>() ? gate_fwd_of<double>(qz, kv, logits, stats, g)
                  : gate_fwd_of<float>(qz, kv, logits, stats, g);
}

template <class Real>
void gate_bwd_of(const fastfpl::View& d_logits, const fastfpl::View& qz,
                 const std::optional<fastfpl::View>& rows, const fastfpl::View& kv,
                 const fastfpl::View& stats, const std::optional<fastfpl::View>& d_qz,
                 const std::optional<fastfpl::View>& d_kv, int64_t chunks, const fastfpl::Gate& g) {
  const Real *by = d_logits.data<Real>(), *in = qz.data<Real>(), *with = kv.data<Real>();
  const Real *kept = stats.data<Real>(), *again = data_of<Real>(rows);
  Real *of_qz = data_of<Real>(d_qz), *of_kv = data_of<Real>(d_kv);
  py::gil_scoped_release release;
  fastfpl::gate_bwd(by, in, again, with, kept, of_qz, of_kv, chunks, g);
}

void gate_bwd(py::handle d_logits_, py::handle qz_, py::handle rows_, py::handle kv_,
              py::handle stats_, py::handle d_qz_, py::handle d_kv_, double scale,
              int64_t threads) {
  const char* op = "gate_bwd";
  const fastfpl::View d_logits(op, "d_logits", d_logits_), qz(op, "qz", qz_), kv(op, "kv", kv_),
      stats(op, "stats", stats_);
  const auto rows = given(op, "rows", rows_), d_qz = given(op, "d_qz", d_qz_),
             d_kv = given(op, "d_kv", d_kv_);
  const fastfpl::Gate g = gate_of(op, qz, kv, scale, threads);
  d_logits.need_size(g.clients * g.classes * g.images);
  stats.need_size(g.clients * g.classes * g.heads * 3 * g.images);
  // without d_qz nothing is added up, and every class is a chunk
  int64_t chunks = g.classes;
  if (d_qz) {
    d_qz->need_ndim(6);
    chunks = d_qz->shape(1);
    if (chunks < 1 && g.classes) fastfpl::refuse(op, "d_qz", "have parts", std::to_string(chunks));
    d_qz->need_size(chunks * qz.size());
  }
  if (d_kv) {
    d_kv->need_size(kv.size());
    const int64_t lanes = kv.is<double>() ? fastfpl::gate_lanes<double>()
                                          : fastfpl::gate_lanes<float>();
    if (!rows) fastfpl::refuse(op, "rows", "be given with d_kv", "None");
    rows->need_size(g.clients * 2 * g.heads * g.images * ((g.width + lanes - 1) / lanes * lanes));
  }
  kv.is<double>() ? gate_bwd_of<double>(d_logits, qz, rows, kv, stats, d_qz, d_kv, chunks, g)
                  : gate_bwd_of<float>(d_logits, qz, rows, kv, stats, d_qz, d_kv, chunks, g);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled faces of fastfpl's ops for the CPU.";
  m.def("transport_plan", &transport_plan, py::arg("sim"), py::arg("plan"), py::arg("iterations"),
        py::arg("residual"), py::arg("eps"), py::arg("mass"), py::arg("balanced"),
        py::arg("max_iter"), py::arg("tol"), py::arg("threads"));
  m.def("gate_fwd", &gate_fwd, py::arg("qz"), py::arg("kv"), py::arg("logits"), py::arg("stats"),
        py::arg("scale"), py::arg("threads"));
  m.def("gate_bwd", &gate_bwd, py::arg("d_logits"), py::arg("qz"), py::arg("rows"), py::arg("kv"),
        py::arg("stats"), py::arg("d_qz"), py::arg("d_kv"), py::arg("scale"), py::arg("threads"));
}
