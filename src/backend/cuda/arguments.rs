//! What kernels are given: the structures of `kernels-cuda`, field by field.

use anyhow::{Result, ensure};

use super::matrix::{Body, Matrix, Plan};

/// `struct Dec` of `dec.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct DecArgument {
    pub(super) residual: u64,
    pub(super) scales: u64,
    pub(super) edges: u64,
    pub(super) in_features: i32,
    pub(super) out_features: i32,
    pub(super) k_chunk: i32,
    pub(super) n_tb: i32,
    pub(super) exact: i32,
    pub(super) list_chunks: i32,
}

/// `struct Gemv` of `gemv.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct GemvArgument {
    pub(super) codes: u64,
    pub(super) aux: u64,
    pub(super) bias: u64,
    pub(super) x: u64,
    pub(super) x_delta: u64,
    pub(super) gamma: u64,
    pub(super) y: u64,
    pub(super) y_delta: u64,
    pub(super) dec_out: u64,
    pub(super) dec_list: u64,
    pub(super) beyond: u64,
    pub(super) dec: DecArgument,
    pub(super) eps: f32,
    pub(super) add: i32,
    pub(super) dec_shared: i32,
}

/// `struct Packed` of `dequant.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct PackedArgument {
    pub(super) codes: u64,
    pub(super) aux: u64,
    pub(super) lut: u64,
    pub(super) out: u64,
}

/// `struct Any` of `gemv_any.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct AnyArgument {
    pub(super) codes: u64,
    pub(super) values: u64,
    pub(super) centres: u64,
    pub(super) bias: u64,
    pub(super) in_features: i32,
    pub(super) out_features: i32,
    pub(super) bits: i32,
    pub(super) kind: i32,
    pub(super) group: i32,
    pub(super) add: i32,
}

impl DecArgument {
    pub(super) const NONE: Self = Self {
        residual: 0,
        scales: 0,
        edges: 0,
        in_features: 0,
        out_features: 0,
        k_chunk: 0,
        n_tb: 0,
        exact: 0,
        list_chunks: 0,
    };

    pub(super) fn without_matrix(plan: &Plan) -> Self {
        Self {
            residual: 0,
            scales: 0,
            edges: plan.edges.pointer(),
            in_features: plan.in_features as i32,
            out_features: plan.out_features as i32,
            k_chunk: plan.k_chunk as i32,
            n_tb: plan.n_tb as i32,
            exact: i32::from(plan.exact),
            list_chunks: plan.list_chunks() as i32,
        }
    }

    pub(super) fn new(matrix: &Matrix, plan: &Plan) -> Result<Self> {
        ensure!(matrix.residual.is_some(), "cuda: a matrix without residuals cannot be compensated");
        let (residual, scales) = matrix.residual.as_ref().map_or((0, 0), |(w, s)| (w.pointer(), s.pointer()));
        Ok(Self { residual, scales, ..Self::without_matrix(plan) })
    }
}

impl AnyArgument {
    pub(super) fn new(matrix: &Matrix, add: bool) -> Result<Self> {
        let Body::Any { codes, values, centres, bits, kind, group } = &matrix.body else {
            anyhow::bail!("cuda: not a matrix in the plain layout");
        };
        Ok(Self {
            codes: codes.pointer(),
            values: values.pointer(),
            centres: centres.pointer(),
            bias: matrix.bias.as_ref().map_or(0, |b| b.pointer()),
            in_features: matrix.in_features as i32,
            out_features: matrix.out_features as i32,
            bits: *bits as i32,
            kind: *kind,
            group: *group as i32,
            add: i32::from(add),
        })
    }
}
