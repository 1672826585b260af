// Products of 8-bit values on Hopper's wgmma and TMA, by CUTLASS: its main loop, our epilogue.
//
// out (m, n) = activation(float(sum) * (input_scale[m] * weight_scale[n]) + bias[n]), in the order of operations and
// with the functions of ../linear/epilogue.cuh, so that integers give the same bits on both paths. Compiled for sm_90a
// alone, with NDEBUG: an assert is a call, and ptxas serializes wgmma around calls.
#pragma once

#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "../linear/epilogue.cuh"
#include "launchers.h"

namespace ds_compress::hopper {

using cute::_0;
using cute::_1;
using cute::Shape;
using cute::Stride;
namespace fusion = cutlass::epilogue::fusion;

/// The last node of the epilogue: bias, activation and the cast. 16-bit outputs are one kernel for both dtypes: `Out`
/// says how many bytes, `is_fp16` which of the two they mean.
template <class Out>
struct Finish : fusion::Sm90VisitorImpl<> {
    struct Arguments {
        int activation = dsc_none;
        bool is_fp16 = false;
    };
    using Params = Arguments;
    struct SharedStorage {};

    template <class Shape>
    static constexpr Params to_underlying_arguments(const Shape&, const Arguments& arguments, void*) {
        return arguments;
    }
    template <class Shape>
    static bool can_implement(const Shape&, const Arguments&) {
        return true;
    }
    template <class Shape>
    static size_t get_workspace_size(const Shape&, const Arguments&) {
        return 0;
    }
    template <class Shape>
    static cutlass::Status initialize_workspace(const Shape&, const Arguments&, void*, cudaStream_t,
                                                cutlass::CudaHostAdapter* = nullptr) {
        return cutlass::Status::kSuccess;
    }

    Params params;
    CUTLASS_HOST_DEVICE Finish() {}
    CUTLASS_HOST_DEVICE Finish(const Params& given, const SharedStorage&) : params(given) {}

    struct Callbacks : fusion::EmptyConsumerStoreCallbacks {
        Params params;
        CUTLASS_DEVICE explicit Callbacks(const Params& given) : params(given) {}

        template <class Sum, class Bias, int count>
        CUTLASS_DEVICE cutlass::Array<Out, count> visit(const cutlass::Array<Sum, count>&, int, int, int,
                                                        const cutlass::Array<float, count>& scaled,
                                                        const cutlass::Array<Bias, count>& bias) {
            // One choice for all elements: with it inside of their loop, every element would step over the code of all.
            switch (params.activation) {
                case dsc_none:
                    return finished<dsc_none>(scaled, bias);
                case dsc_relu:
                    return finished<dsc_relu>(scaled, bias);
                case dsc_gelu_erf:
                    return finished<dsc_gelu_erf>(scaled, bias);
                case dsc_gelu_tanh:
                    return finished<dsc_gelu_tanh>(scaled, bias);
                default:
                    return finished<dsc_silu>(scaled, bias);
            }
        }

        template <int activation, class Bias, int count>
        CUTLASS_DEVICE cutlass::Array<Out, count> finished(const cutlass::Array<float, count>& scaled,
                                                           const cutlass::Array<Bias, count>& bias) const {
            cutlass::Array<Out, count> result;
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < count; i++) {
                const float y = linear::activate(math::add(scaled[i], bias[i]), activation);
                if constexpr (sizeof(Out) == 4) {
                    result[i] = y;
                } else {
                    const uint16_t bits = params.is_fp16 ? __half_as_ushort(__float2half_rn(y))
                                                         : __bfloat16_as_ushort(__float2bfloat16_rn(y));
                    result[i] = Out::bitcast(bits);
                }
            }
            return result;
        }
    };

    template <bool reference_source, class... Arguments_>
    CUTLASS_DEVICE auto get_consumer_store_callbacks(const fusion::ConsumerStoreArgs<Arguments_...>&) {
        return Callbacks(params);
    }
};

/// One instance: Out is float or cutlass::bfloat16_t.
template <class Code, class Sum, class Out, class Tile, class Cluster, class Schedule, class EpilogueSchedule,
          class Scheduler = void>
struct Product {
    template <template <class> class Op, class A, class B>
    using Node =
        fusion::Sm90EVT<fusion::Sm90Compute<Op, float, float, cutlass::FloatRoundStyle::round_to_nearest>, A, B>;
    using InputScale = fusion::Sm90ColBroadcast<0, Tile, float, float, Stride<_1, _0, _0>>;
    using PerOutput = fusion::Sm90RowBroadcast<0, Tile, float, float, Stride<_0, _1, _0>>;
    using Scale = Node<cutlass::multiplies, InputScale, PerOutput>;
    using Scaled = Node<cutlass::multiplies, fusion::Sm90AccFetch, Scale>;
    using Tree = fusion::Sm90EVT<Finish<Out>, Scaled, PerOutput>;

    static constexpr int out_alignment = 16 / sizeof(Out);
    using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
        cutlass::epilogue::collective::EpilogueTileAuto, Sum, float, void, cutlass::layout::RowMajor, out_alignment,
        Out, cutlass::layout::RowMajor, out_alignment, EpilogueSchedule, Tree>::CollectiveOp;
    using Main = typename cutlass::gemm::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Code, cutlass::layout::RowMajor, 16, Code,
        cutlass::layout::ColumnMajor, 16, Sum, Tile, Cluster,
        cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
        Schedule>::CollectiveOp;
    using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Main, Epilogue, Scheduler>;
    using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

    static cudaError_t run(const DscProduct& p, cudaStream_t stream) {
        typename Gemm::Arguments arguments{};
        arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
        arguments.problem_shape = {static_cast<int>(p.m), static_cast<int>(p.n), static_cast<int>(p.pitch), 1};
        arguments.mainloop.ptr_A = static_cast<const Code*>(p.quantized);
        arguments.mainloop.dA = {p.pitch, _1{}, 0};
        arguments.mainloop.ptr_B = static_cast<const Code*>(p.weight);
        arguments.mainloop.dB = {p.pitch, _1{}, 0};
        arguments.epilogue.ptr_D = static_cast<Out*>(p.out);
        arguments.epilogue.dD = {p.n, _1{}, 0};
        // Without a bias -0 is added, which leaves every number as it is, +0 too.
        arguments.epilogue.thread = {{{}, {{p.input_scale}, {p.weight_scale}, {}}, {}},
                                     {p.bias, -0.0f},
                                     {p.activation, p.out_dtype == dsc_float16}};
        arguments.hw_info.device_id = p.device;
        arguments.hw_info.sm_count = p.multiprocessors;
        if (Gemm::get_workspace_size(arguments) != 0) return cudaErrorNotSupported;
        Gemm gemm;
        if (gemm.initialize(arguments, nullptr, stream) != cutlass::Status::kSuccess) return cudaErrorInvalidValue;
        return gemm.run(stream) == cutlass::Status::kSuccess ? cudaGetLastError() : cudaErrorLaunchFailure;
    }
};

}  // namespace ds_compress::hopper
