//! `secateur generate`: let a checkpoint write a few words.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, anyhow};

use super::process;
use crate::engine::model::kernel::allocator;
use crate::engine::model::{Checkpoint, Compute, Decoder, Rounding, generate};

#[derive(clap::Args)]
pub struct Args {
    /// Hugging Face directory of the model.
    #[arg(long)]
    model: PathBuf,
    /// Text to go on from.
    #[arg(long)]
    prompt: String,
    /// Most tokens to write.
    #[arg(long, default_value_t = 64)]
    tokens: usize,
    /// 0 takes the likeliest token each time.
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Seeds the sampling.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    allocator::keep_freed();
    process::one_thread_pool();
    let checkpoint = Checkpoint::open(&args.model)?;
    let tokenizer = checkpoint.tokenizer()?;
    let decoder = Decoder::open(&checkpoint, &Compute::cpu(Some(Rounding::Once)))?;
    let encoded = tokenizer.encode(args.prompt.as_str(), true).map_err(|e| anyhow!("the prompt: {e}"))?;
    let prompt = encoded.get_ids();
    let written = generate::continue_text(&decoder, prompt, args.tokens, args.temperature, args.seed)?;
    // Decoded together with the prompt: a byte-level tokenizer may split a letter over two tokens.
    let all: Vec<u32> = prompt.iter().chain(&written).copied().collect();
    let text = tokenizer.decode(&all, true).map_err(|e| anyhow!("the tokens written: {e}"))?;
    writeln!(std::io::stdout(), "{text}").context("standard output")?;
    Ok(ExitCode::SUCCESS)
}
