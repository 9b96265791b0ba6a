//! Cuts read off the layer profile: nothing is measured again.

use super::search::{better, path};
use super::{Found, Room};
use crate::job::report::{Block, Candidate};

/// Scores nearer than this are a tie: sums of the same distances in another order.
const TIE: f64 = 1e-12;

/// The block of least score; of equals, the deeper one.
pub fn block(room: &Room, score: impl Fn(Block) -> f64) -> Found {
    let places = |len: u32| -> Vec<Candidate> {
        let blocks = room.starts(len).map(|start| Block { start, len });
        blocks.map(|block| Candidate { start: block.start, score: score(block) }).collect()
    };
    let cut = |best: Candidate, len: u32| Block { start: best.start, len }.layers().collect();
    let candidates = places(room.n);
    let path = (1..=room.n).map(|len| cut(nearest(&places(len)), len)).collect();
    Found { score: nearest(&candidates).score, candidates, path, considered: Vec::new() }
}

fn nearest(candidates: &[Candidate]) -> Candidate {
    let least = candidates.iter().map(|c| c.score).fold(f64::INFINITY, f64::min);
    let best = candidates.iter().rfind(|c| c.score <= least + TIE);
    *best.expect("the range of blocks was checked not to be empty. This is a bug.")
}

/// The deepest block, whatever its score.
pub fn deepest(room: &Room) -> Found {
    let block = |len: u32| (room.end - len..room.end).collect();
    Found {
        score: 0.0,
        candidates: vec![Candidate { start: room.end - room.n, score: 0.0 }],
        path: (1..=room.n).map(block).collect(),
        considered: Vec::new(),
    }
}

/// The layers of least score, which need not stand together; of equals, the deeper ones.
pub fn singles(room: &Room, scores: &[f64]) -> Found {
    let order = order(room, scores);
    let dropped = &order[..room.n as usize];
    Found {
        score: dropped.iter().map(|l| scores[*l as usize]).sum(),
        candidates: room.layers().map(|l| Candidate { start: l, score: scores[l as usize] }).collect(),
        path: path(dropped),
        considered: Vec::new(),
    }
}

/// The layers that may go, the one of least score first.
pub fn order(room: &Room, scores: &[f64]) -> Vec<u32> {
    let mut order: Vec<u32> = room.layers().collect();
    order.sort_by(|a, b| better((scores[*a as usize], a), (scores[*b as usize], b)));
    order
}
