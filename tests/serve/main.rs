//! The server, byte by byte: with a model that says what it is told to, and with a real one.
#![cfg(feature = "serve")]

#[path = "../answers/mod.rs"]
mod answers;
#[path = "../devices/mod.rs"]
mod devices;

mod bad;
mod chat;
mod client;
mod clients;
mod completions;
mod faults;
mod lines;
mod program;
mod protocols;
mod real;
mod rust_client;
mod script;
mod tools;
