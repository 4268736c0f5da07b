// fastfpl._C: one m.def per entry point. Every tensor is passed as it is and checked here; the work
// runs without the interpreter's lock.
#include <pybind11/pybind11.h>

#include "dlpack.h"
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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled faces of fastfpl's ops for the CPU.";
  m.def("transport_plan", &transport_plan, py::arg("sim"), py::arg("plan"), py::arg("iterations"),
        py::arg("residual"), py::arg("eps"), py::arg("mass"), py::arg("balanced"),
        py::arg("max_iter"), py::arg("tol"), py::arg("threads"));
}
