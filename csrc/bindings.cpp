// fastfpl._C: one m.def per entry point. Every tensor is passed as it is and checked here; the work
// runs without the interpreter's lock.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "dlpack.h"
#include "transport.h"

namespace py = pybind11;

namespace {

// What may be left out.
template <class Real>
Real* data_or_null(const std::optional<fastfpl::View>& view) {
  return view ? view->data<Real>() : nullptr;
}

std::optional<fastfpl::View> optional_view(const char* op, const char* name, py::handle tensor,
                                           int64_t size) {
  if (tensor.is_none()) return std::nullopt;
  std::optional<fastfpl::View> view(std::in_place, op, name, tensor);
  view->need_size(size);
  return view;
}

template <class Real>
int64_t transport_plan_of(const fastfpl::View& sim, const fastfpl::View& plan,
                          const fastfpl::View& iterations, const fastfpl::View& residual,
                          const std::optional<fastfpl::View>& rows,
                          const std::optional<fastfpl::View>& columns,
                          const std::optional<fastfpl::View>& logits,
                          const fastfpl::Transport& t) {
  const fastfpl::Arrays<Real> arrays{sim.data<Real>(),
                                     data_or_null<Real>(rows),
                                     data_or_null<Real>(columns),
                                     plan.data<Real>(),
                                     data_or_null<Real>(logits),
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
  const auto rows = optional_view(op, "rows", rows_, problems * patches);
  const auto columns = optional_view(op, "columns", columns_, problems * prompts);
  const auto logits = optional_view(op, "logits", logits_, problems);
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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled faces of fastfpl's ops for the CPU.";
  m.def("transport_plan", &transport_plan, py::arg("sim"), py::arg("plan"), py::arg("iterations"),
        py::arg("residual"), py::arg("eps"), py::arg("mass"), py::arg("balanced"),
        py::arg("max_iter"), py::arg("tol"), py::arg("threads"), py::arg("rows") = py::none(),
        py::arg("columns") = py::none(), py::arg("logits") = py::none(), py::arg("classes") = 0);
  m.def("weigh_plan", &weigh_plan, py::arg("plan"), py::arg("by"), py::arg("out"),
        py::arg("threads"));
  m.attr("most_prompts") = fastfpl::kMostPrompts;
}
