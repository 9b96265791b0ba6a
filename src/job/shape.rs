//! The shape of a spec, checked against the JSON schema its types derive.
//!
//! serde stops at the first error and forgets the place inside tagged values
//! (`{"from": …}`). The schema that the OpenAPI document publishes knows every
//! place, so one walk over it finds everything that is wrong, each with its
//! JSON pointer, and mends the value on the way so that the rules of
//! [`JobSpec::validate`](super::spec::JobSpec::validate) can be asked as well.

use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::complaint::Complaint;

/// JSON schemas by name, closed: every object refuses fields it does not name.
pub struct Shapes {
    schemas: Map<String, Value>,
}

impl Shapes {
    /// The schemas `T` needs, its own under its name.
    ///
    /// # Panics
    /// When a schema is no JSON, which none is.
    #[must_use]
    pub fn of<T: ToSchema>() -> Self {
        let mut found = vec![(T::name().into_owned(), T::schema())];
        T::schemas(&mut found);
        let mut shapes = Self { schemas: Map::new() };
        for (name, schema) in found {
            let schema = serde_json::to_value(schema).expect("a schema is JSON. This is a bug.");
            shapes.schemas.insert(name, schema);
        }
        let closed = shapes.schemas.iter().map(|(name, schema)| (name.clone(), shapes.close(schema)));
        Self { schemas: closed.collect() }
    }

    /// Every schema by name.
    pub fn schemas(&self) -> &Map<String, Value> {
        &self.schemas
    }

    /// Says all that is wrong with the shape of `value`, which should be what
    /// the schema `name` describes, and mends it to the nearest that fits.
    pub fn check(&self, name: &str, value: &mut Value) -> Vec<Complaint> {
        let mut walk = Walk { shapes: self, complaints: Vec::new() };
        walk.check(&self.schemas[name], value, "");
        walk.complaints
    }

    /// serde refuses unknown fields in tagged values too; the derived schema
    /// does not say so, and for `tag + struct` and flattened fields it says the impossible (`allOf`
    /// of a closed struct and fields it does not know).
    fn close(&self, schema: &Value) -> Value {
        if let Some(parts) = schema.get("allOf").and_then(Value::as_array) {
            let mut merged = self.merge(schema, parts);
            if parts.iter().any(|part| part["additionalProperties"] == json!(false)) {
                merged["additionalProperties"] = json!(false);
            }
            return merged;
        }
        let Some(variants) = schema.get("oneOf").and_then(Value::as_array) else { return schema.clone() };
        let variants = variants.iter().map(|variant| {
            let mut closed = match variant.get("allOf").and_then(Value::as_array) {
                Some(parts) => self.merge(variant, parts),
                None => variant.clone(),
            };
            if closed.get("properties").is_some() {
                closed["additionalProperties"] = json!(false);
            }
            closed
        });
        let mut closed = schema.clone();
        closed["oneOf"] = variants.collect();
        closed
    }

    fn merge(&self, variant: &Value, parts: &[Value]) -> Value {
        let mut properties = Map::new();
        let mut required = Vec::new();
        for part in parts.iter().rev().map(|part| self.resolve(part)) {
            let inner = part.get("allOf").and_then(Value::as_array).map(|parts| self.merge(part, parts));
            let part = inner.as_ref().unwrap_or(part);
            properties.extend(part["properties"].as_object().cloned().unwrap_or_default());
            required.extend(part["required"].as_array().cloned().unwrap_or_default());
        }
        let mut merged = json!({"type": "object", "properties": properties, "required": required});
        if let Some(description) = variant.get("description") {
            merged["description"] = description.clone();
        }
        merged
    }

    fn resolve<'a>(&'a self, schema: &'a Value) -> &'a Value {
        let name = schema.get("$ref").and_then(Value::as_str).and_then(|r| r.rsplit('/').next());
        name.map_or(schema, |name| &self.schemas[name])
    }

    /// The least value that fits `schema`.
    fn filler(&self, schema: &Value) -> Value {
        let schema = self.resolve(schema);
        if let Some(variants) = schema.get("oneOf").and_then(Value::as_array) {
            return self.filler(&variants[0]);
        }
        if let Some(values) = schema.get("enum").and_then(Value::as_array) {
            return values[0].clone();
        }
        match types(schema).first().copied().unwrap_or_default() {
            "object" => {
                let fields = names(&schema["required"]);
                fields.iter().map(|f| ((*f).to_string(), self.filler(&schema["properties"][f]))).collect()
            }
            "array" => json!([]),
            "boolean" => json!(false),
            "integer" | "number" => json!(1),
            "string" if schema["format"] == "uuid" => json!(uuid::Uuid::nil()),
            "string" => json!("x"),
            _ => Value::Null,
        }
    }
}

struct Walk<'a> {
    shapes: &'a Shapes,
    complaints: Vec<Complaint>,
}

impl Walk<'_> {
    fn complain(&mut self, pointer: &str, message: impl Into<String>) {
        self.complaints.push(Complaint { pointer: pointer.into(), message: message.into() });
    }

    /// Notes that `value` is wrong and puts in what fits.
    fn replace(&mut self, schema: &Value, value: &mut Value, at: &str, message: impl Into<String>) {
        self.complain(at, message);
        *value = self.shapes.filler(schema);
    }

    fn check(&mut self, schema: &Value, value: &mut Value, at: &str) {
        let schema = self.shapes.resolve(schema);
        if let Some(variants) = schema.get("oneOf").and_then(Value::as_array) {
            return self.check_choice(variants, value, at);
        }
        let types = types(schema);
        if !types.iter().any(|t| fits(t, value)) {
            return self.replace(
                schema,
                value,
                at,
                format!("must be {}, not {}", wanted(&types), shown(value)),
            );
        }
        if let Some(allowed) = schema.get("enum").and_then(Value::as_array) {
            if !allowed.contains(value) {
                let message = format!("must be one of {}, not {}", listed(allowed), shown(value));
                self.replace(schema, value, at, message);
            }
            return;
        }
        match value {
            Value::Object(map) => self.check_object(schema, map, at),
            Value::Array(items) => {
                for (i, item) in items.iter_mut().enumerate() {
                    self.check(&schema["items"], item, &format!("{at}/{i}"));
                }
            }
            Value::Number(number) => {
                let number = number.clone();
                let whole = number.as_i64().map(i128::from).or(number.as_u64().map(i128::from));
                if let Some((low, high)) = whole_numbers(schema)
                    && whole.is_none_or(|n| !(low..=high).contains(&n))
                {
                    self.replace(schema, value, at, format!("must be from {low} to {high}, not {number}"));
                }
            }
            Value::String(text) if schema["format"] == "uuid" && uuid::Uuid::parse_str(text).is_err() => {
                let message = format!("must be a UUID, not {}", shown(value));
                self.replace(schema, value, at, message);
            }
            // PostgreSQL keeps no such text, nor does a path have it.
            Value::String(text) if text.contains('\0') => {
                self.replace(schema, value, at, "must not contain the character NUL");
            }
            Value::String(_) | Value::Bool(_) | Value::Null => {}
        }
    }

    fn check_object(&mut self, schema: &Value, map: &mut Map<String, Value>, at: &str) {
        let properties = schema.get("properties").and_then(Value::as_object);
        let mut unknown = Vec::new();
        for (key, value) in &mut *map {
            let place = format!("{at}/{}", escaped(key));
            match properties.and_then(|p| p.get(key)) {
                Some(property) => self.check(property, value, &place),
                None if schema["additionalProperties"].is_object() && key.contains('\0') => {
                    self.complain(&place, "must not contain the character NUL");
                    unknown.push(key.clone());
                }
                None if schema["additionalProperties"].is_object() => {
                    self.check(&schema["additionalProperties"], value, &place);
                }
                None => {
                    let known: Vec<_> =
                        properties.iter().flat_map(|p| p.keys()).map(|k| format!("`{k}`")).collect();
                    self.complain(&place, format!("is no field here; the fields are {}", known.join(", ")));
                    unknown.push(key.clone());
                }
            }
        }
        for key in unknown {
            map.shift_remove(&key);
        }
        for field in names(&schema["required"]) {
            if !map.contains_key(field) {
                self.complain(&format!("{at}/{}", escaped(field)), "is required");
                map.insert(field.into(), self.shapes.filler(&schema["properties"][field]));
            }
        }
    }

    /// One of several shapes: told apart by a tag, by the only key, or null.
    fn check_choice(&mut self, variants: &[Value], value: &mut Value, at: &str) {
        if let [some, null] = variants
            && null["type"] == "null"
        {
            return if value.is_null() {
            } else {
                self.check(some, value, at);
            };
        }
        let Value::Object(map) = value else {
            let message = format!("must be an object, not {}", shown(value));
            return self.replace(&variants[0], value, at, message);
        };
        let Some(tag) = tag_of(&variants[0]) else { return self.check_only_key(variants, value, at) };
        let wanted: Vec<Value> = variants.iter().map(|v| v["properties"][tag]["enum"][0].clone()).collect();
        let place = format!("{at}/{tag}");
        match map.get(tag) {
            None => {
                self.complain(&place, format!("is required: one of {}", listed(&wanted)));
                *value = self.shapes.filler(&variants[0]);
            }
            Some(given) => match wanted.iter().position(|w| w == given) {
                Some(i) => self.check(&variants[i], value, at),
                None => {
                    self.complain(
                        &place,
                        format!("must be one of {}, not {}", listed(&wanted), shown(given)),
                    );
                    *value = self.shapes.filler(&variants[0]);
                }
            },
        }
    }

    /// `{"layers": 3}` or `{"fraction": 0.3}`.
    fn check_only_key(&mut self, variants: &[Value], value: &mut Value, at: &str) {
        let keys: Vec<&str> = variants.iter().flat_map(|v| names(&v["required"])).collect();
        let known = keys.iter().map(|k| format!("`{k}`")).collect::<Vec<_>>().join(", ");
        let Value::Object(map) = &mut *value else { return };
        let strangers: Vec<String> = map.keys().filter(|k| !keys.contains(&k.as_str())).cloned().collect();
        for key in &strangers {
            self.complain(
                &format!("{at}/{}", escaped(key)),
                format!("is no field here; give one of {known}"),
            );
            map.shift_remove(key);
        }
        let given: Vec<usize> = (0..keys.len()).filter(|i| map.contains_key(keys[*i])).collect();
        match given[..] {
            [one] => self.check(&variants[one], value, at),
            [] if strangers.is_empty() => {
                self.replace(&variants[0], value, at, format!("give one of {known}"));
            }
            [] => *value = self.shapes.filler(&variants[0]),
            _ => self.replace(&variants[0], value, at, format!("give only one of {known}")),
        }
    }
}

/// The field whose only value names the variant.
fn tag_of(variant: &Value) -> Option<&str> {
    let required = names(&variant["required"]);
    let mut properties = variant["properties"].as_object()?.iter();
    let is_tag = |v: &Value| v["enum"].as_array().is_some_and(|values| values.len() == 1);
    properties.find(|(key, v)| required.contains(&key.as_str()) && is_tag(v)).map(|(key, _)| key.as_str())
}

fn types(schema: &Value) -> Vec<&str> {
    match &schema["type"] {
        Value::String(one) => vec![one],
        many => names(many),
    }
}

fn names(list: &Value) -> Vec<&str> {
    list.as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

fn fits(name: &str, value: &Value) -> bool {
    match value {
        Value::Null => name == "null",
        Value::Bool(_) => name == "boolean",
        Value::Number(n) => name == "number" || name == "integer" && !n.is_f64(),
        Value::String(_) => name == "string",
        Value::Array(_) => name == "array",
        Value::Object(_) => name == "object",
    }
}

/// The least and the greatest whole number that fits. What has a bound below has no sign, unless that is below 0.
fn whole_numbers(schema: &Value) -> Option<(i128, i128)> {
    let given = |name: &str| schema[name].as_f64().map(|bound| bound as i128);
    let least = given("minimum");
    let most = match (schema["format"].as_str()?, least) {
        ("int32", None) => i128::from(i32::MAX),
        ("int32", Some(_)) => i128::from(u32::MAX),
        ("int64", None) => i128::from(i64::MAX),
        ("int64", Some(_)) => i128::from(u64::MAX),
        _ => return None,
    };
    Some((least.unwrap_or(-most - 1), given("maximum").unwrap_or(most)))
}

fn wanted(types: &[&str]) -> String {
    let words = types.iter().map(|name| match *name {
        "integer" => "a whole number",
        "number" => "a number",
        "boolean" => "true or false",
        "string" => "a string",
        "array" => "an array",
        "object" => "an object",
        other => other,
    });
    words.collect::<Vec<_>>().join(" or ")
}

fn listed(values: &[Value]) -> String {
    values.iter().map(Value::to_string).collect::<Vec<_>>().join(", ")
}

/// The value for a message: short, whatever was sent.
fn shown(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(b) => b.to_string(),
        Value::Number(n) => n.to_string(),
        Value::String(text) if text.chars().count() > 40 => {
            format!("\"{}…\"", text.chars().take(40).collect::<String>().escape_debug())
        }
        Value::String(_) => value.to_string(),
        Value::Array(_) => "an array".into(),
        Value::Object(_) => "an object".into(),
    }
}

/// A key as a part of a JSON pointer (RFC 6901).
pub fn escaped(key: &str) -> String {
    key.replace('~', "~0").replace('/', "~1")
}
