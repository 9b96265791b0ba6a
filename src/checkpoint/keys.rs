//! Look-ups in `config.json` that name the key when something is wrong.

use std::cell::RefCell;
use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::{Result, wrong};

/// An object of `config.json` that remembers what it was asked for.
#[derive(Clone)]
pub struct Keys<'a> {
    map: &'a Map<String, Value>,
    asked: RefCell<BTreeSet<String>>,
}

impl<'a> Keys<'a> {
    pub fn new(map: &'a Map<String, Value>) -> Self {
        Self { map, asked: RefCell::default() }
    }

    /// The value of a key; null is as good as absent.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.asked.borrow_mut().insert(key.to_owned());
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// Whether the key is there at all, be it null.
    pub fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// What there is and nobody asked for.
    pub fn unasked(&self) -> impl Iterator<Item = (&'a String, &'a Value)> {
        let asked = self.asked.borrow().clone();
        self.map.iter().filter(move |(key, _)| !asked.contains(*key))
    }

    pub fn text(&self, key: &str) -> Result<&'a str> {
        let value = self.get(key).and_then(Value::as_str);
        value.ok_or_else(|| wrong(format!("config.json: {key} is missing or not a text")))
    }

    pub fn text_or(&self, key: &str, default: &'static str) -> Result<&'a str> {
        if self.get(key).is_some() { self.text(key) } else { Ok(default) }
    }

    pub fn flag_or(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => Err(wrong(format!("config.json: {key} is neither true nor false"))),
        }
    }

    /// A whole number from 1 to `most`.
    pub fn size(&self, key: &str, most: usize) -> Result<usize> {
        match self.get(key).and_then(Value::as_u64) {
            Some(n) if n >= 1 && n <= most as u64 => Ok(n as usize),
            Some(n) => Err(wrong(format!("config.json: {key} is {n}; 1 to {most} would be sensible"))),
            None => Err(wrong(format!("config.json: {key} is missing or not a whole number"))),
        }
    }

    pub fn size_or(&self, key: &str, default: usize, most: usize) -> Result<usize> {
        if self.get(key).is_some() { self.size(key, most) } else { Ok(default) }
    }

    /// A positive number.
    pub fn number(&self, key: &str) -> Result<f64> {
        match self.get(key).and_then(Value::as_f64) {
            Some(n) if n.is_finite() && n > 0.0 => Ok(n),
            _ => Err(wrong(format!("config.json: {key} is missing or not a positive number"))),
        }
    }

    pub fn number_or(&self, key: &str, default: f64) -> Result<f64> {
        if self.get(key).is_some() { self.number(key) } else { Ok(default) }
    }

    /// A positive number, if there is one.
    pub fn number_if(&self, key: &str) -> Result<Option<f64>> {
        self.get(key).map(|_| self.number(key)).transpose()
    }

    pub fn object(&self, key: &str) -> Result<Option<Keys<'a>>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok((!map.is_empty()).then(|| Keys::new(map))),
            Some(_) => Err(wrong(format!("config.json: {key} is not an object"))),
        }
    }

    /// `count` positive numbers.
    pub fn numbers(&self, key: &str, count: usize) -> Result<Vec<f64>> {
        let list = self.get(key).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let numbers: Vec<f64> =
            list.iter().filter_map(Value::as_f64).filter(|n| *n > 0.0 && n.is_finite()).collect();
        if numbers.len() == count && list.len() == count {
            return Ok(numbers);
        }
        Err(wrong(format!("config.json: {key} must list {count} positive numbers")))
    }

    /// One entry for each of `count` layers.
    pub fn per_layer(&self, key: &str, count: usize) -> Result<Option<&'a Vec<Value>>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(list)) if list.len() == count => Ok(Some(list)),
            Some(_) => {
                Err(wrong(format!("config.json: {key} must list one entry for each of the {count} layers")))
            }
        }
    }

    /// Whole numbers below `below`; none when absent.
    pub fn indices(&self, key: &str, below: usize) -> Result<Vec<usize>> {
        let bad = || wrong(format!("config.json: {key} must list numbers below {below}"));
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(list)) => {
                let index = |v: &Value| v.as_u64().filter(|n| *n < below as u64).map(|n| n as usize);
                list.iter().map(|v| index(v).ok_or_else(bad)).collect()
            }
            Some(_) => Err(bad()),
        }
    }

    /// One token id or a list of them.
    pub fn tokens(&self, key: &str) -> Vec<u32> {
        let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
        match self.get(key) {
            Some(Value::Array(list)) => list.iter().filter_map(id).collect(),
            Some(one) => id(one).into_iter().collect(),
            None => Vec::new(),
        }
    }
}
