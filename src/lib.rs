//! Low-bit language models with dynamic error compensation: quantize, profile, tune, generate, evaluate.
//!
//! # The idea
//! A model's linear layers are quantized to 3 or 4 bits. What that lost, the *residual*, is kept in host
//! memory, itself in 4 bits. For each token, the few input channels whose activations are large get their
//! residual fetched over the host link and added to the product, while the product of the quantized weights
//! runs: DecDEC (Park et al., OSDI 2025). A few channels in a thousand give back a good part of the quality.
//!
//! # The flow
//! ```text
//! foreign files ── source ──┐                   ┌── backend::cpu
//!                           ├─ weights ─ model ─┼── backend::wgsl   the slow, obvious twin
//! quantize ── checkpoint ───┘              │    └── backend::cuda
//!                                          ├─ engine                text
//!                                          ├─ eval                  perplexity
//!                                          └─ profile ─ nsys ─ tune n_tb and k_chunk
//! ```
//! Arrows go down only: nothing above [`backend`] names a backend, and backends do not know each other. Each
//! outside crate has one door, held by `tests/architecture.rs`.
//!
//! # The files
//! | file | what is in it |
//! |---|---|
//! | [`format`](mod@format) | what is stored: AnyPrec, LUT-GEMM, residuals, thresholds; pure |
//! | [`tensors`] | a model in files: named tensors, checked, and fused to what a decoder multiplies by |
//! | [`source`] | foreign files: Hugging Face, GGUF, PyTorch, the reference's directories, AWQ, GPTQ |
//! | [`checkpoint`] | our directory: open, validate, map, write |
//! | [`files`], [`mapped`] | reading what others made, in limits; writing that survives kills; maps |
//! | [`open`], [`convert`](mod@convert) | from a path to whichever of these it is, and from that to our directory |
//! | `hub` | models of the Hugging Face Hub by name, downloaded into its cache: the feature `hub` |
//! | [`config`], [`weights`] | what a model is, and where its numbers come from |
//! | [`mod@quantize`] | calibration, codebooks, AWQ, refinement, mixed precision, residuals: source to checkpoint |
//! | [`dec`] | which channels are compensated, and the plan that says how; pure |
//! | [`backend`] | the contract with devices, and its implementations |
//! | [`model`] | a decoder on a device: weights, state, forward |
//! | [`device`], [`engine`], [`progress`] | a device by its name; a model on it that makes texts, and how far it is |
//! | [`sampling`], [`eval`] | from logits to a token, to a number |
//! | `serve` | a server of OpenAI's and Anthropic's protocols on an engine: the feature `serve` |
//! | [`mod@profile`], [`nsys`], [`tune`], [`tuned`] | the sweep, its two files, the search and its report; what was found |
//! | [`timeline`] | where a token's time goes: bytes, floors and times of its parts, text and picture |
//! | `fingerprint`, `interrupted` | what tells one model from another; how a long job hears that it is to stop |
//! | [`host`], `processor` | the memory that this process may take; the instructions that its loops use |
//! | [`random`] | models of random numbers, to measure speed where no weights can be had |
//! | [`tokenizer`] | text to ids and back, chat templates, tokens that end a text |
//!
//! The program (`main.rs`, `cli.rs`, `commands/`) parses, calls one of these for each command, and prints. It is the
//! feature `cli`, with the profiler, the tuner and all plots: a library without it has fewer crates to build.

#![deny(clippy::print_stdout)]
#![cfg_attr(not(test), deny(clippy::print_stderr))]

pub mod backend;
pub mod checkpoint;
pub mod config;
pub mod convert;
pub mod dec;
pub mod device;
pub mod engine;
pub mod eval;
pub mod files;
mod fingerprint;
#[cfg(feature = "cli")]
mod fonts;
pub mod format;
pub mod host;
#[cfg(feature = "hub")]
pub mod hub;
mod interrupted;
pub mod mapped;
pub mod model;
#[cfg(feature = "cli")]
pub mod nsys;
pub mod open;
mod processor;
#[cfg(feature = "cli")]
pub mod profile;
pub mod progress;
pub mod quantize;
pub mod random;
pub mod sampling;
#[cfg(feature = "serve")]
pub mod serve;
pub mod source;
pub mod tensors;
pub mod timeline;
pub mod tokenizer;
#[cfg(feature = "cli")]
pub mod tune;
pub mod tuned;
pub mod weights;

#[cfg(test)]
#[path = "../tests/devices/mod.rs"]
mod devices;
