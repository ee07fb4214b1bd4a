// savl::channel_gate on the CPU; the op is defined in savl/ops/channel_gate.py.
#include <cstdint>
#include <initializer_list>

#include "cpu/tensors.h"

namespace savl::cpu {
namespace {

const char* const kOp = "savl::channel_gate";

// A parameter of the given shape in the dtype of the arithmetic.
Tensor parameter(const Tensor& tensor, std::initializer_list<int64_t> shape, ScalarType arithmetic) {
  const ScalarType dtype = tensor.scalar_type();
  const bool fits = dtype == arithmetic || dtype == ScalarType::Float ||
                    (dtype == ScalarType::BFloat16 && arithmetic == ScalarType::Float);
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t dim = 0;
  for (const int64_t size : shape) same = same && tensor.size(dim++) == size;
  STD_TORCH_CHECK(tensor.is_cpu() && fits && same, kOp, ": a parameter has the wrong shape, device or dtype");
  return contiguous_as(tensor, arithmetic);
}

Tensor channel_gate(const Tensor& x_in, const Tensor& weight_in, const Tensor& bias_in, const Tensor& squeeze_weight_in,
                    const Tensor& squeeze_bias_in, const Tensor& excite_weight_in, const Tensor& excite_bias_in,
                    int64_t rows, int64_t columns, int64_t neighbourhood, double scale) {
  const Storage storage = storage_of(kOp, x_in);
  const ScalarType arithmetic = arithmetic_of(x_in);
  STD_TORCH_CHECK(x_in.is_cpu() && x_in.dim() == 4 && weight_in.dim() == 4 && squeeze_weight_in.dim() == 2, kOp,
                  ": x and weight must have four dimensions, squeeze_weight two");
  ChannelGateArgs args{};
  args.batch = x_in.size(0);
  args.height = x_in.size(1);
  args.width = x_in.size(2);
  args.channels = x_in.size(3);
  args.outputs = weight_in.size(0);
  args.squeezed = squeeze_weight_in.size(0);
  args.rows = rows;
  args.columns = columns;
  args.neighbourhood = neighbourhood;
  args.scale = scale;
  STD_TORCH_CHECK(args.channels > 0 && args.height > 0 && args.width > 0 && rows > 0 && columns > 0 &&
                      args.height % rows == 0 && args.width % columns == 0 && neighbourhood > 0 &&
                      neighbourhood % 2 == 1,
                  kOp, ": rows and columns must divide the image, and neighbourhood must be odd");
  const Tensor x = as_rows(x_in);
  const Tensor weight = parameter(weight_in, {args.outputs, args.channels, 3, 3}, arithmetic);
  const Tensor bias = parameter(bias_in, {args.outputs}, arithmetic);
  const Tensor squeeze_weight = parameter(squeeze_weight_in, {args.squeezed, args.outputs}, arithmetic);
  const Tensor squeeze_bias = parameter(squeeze_bias_in, {args.squeezed}, arithmetic);
  const Tensor excite_weight = parameter(excite_weight_in, {args.outputs, args.squeezed}, arithmetic);
  const Tensor excite_bias = parameter(excite_bias_in, {args.outputs}, arithmetic);
  const int64_t windows = args.batch * rows * columns, row_count = args.batch * args.height;
  Tensor gate = new_tensor({args.batch, rows, columns, args.outputs}, x.scalar_type());
  Tensor row_sums = new_tensor({row_count * columns * 3 * args.channels}, ScalarType::Double);
  Tensor averages = new_tensor({windows * 9 * args.channels}, arithmetic);
  args.x = x.const_data_ptr();
  args.x_stride = row_stride(x);
  args.weight = weight.const_data_ptr();
  args.bias = bias.const_data_ptr();
  args.squeeze_weight = squeeze_weight.const_data_ptr();
  args.squeeze_bias = squeeze_bias.const_data_ptr();
  args.excite_weight = excite_weight.const_data_ptr();
  args.excite_bias = excite_bias.const_data_ptr();
  args.row_sums = row_sums.mutable_data_ptr<double>();
  args.averages = averages.mutable_data_ptr();
  args.gate = gate.mutable_data_ptr();

  const auto& table = kernels().channel_gate;
  args.step = ChannelGateArgs::kRowSums;
  run(table, storage, args, row_count, rows_per_thread(3 * args.width * args.channels));
  args.step = ChannelGateArgs::kAverages;
  run(table, storage, args, windows, rows_per_thread(9 * args.channels * (args.height / rows)));
  args.step = ChannelGateArgs::kGates;
  run(table, storage, args, windows, rows_per_thread(9 * args.channels * args.outputs / 4));
  return gate;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(savl, CPU, library) { library.impl("channel_gate", TORCH_BOX(&channel_gate)); }

}  // namespace savl::cpu
