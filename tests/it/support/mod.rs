//! What tests share: tiny models, a private database, a running service.
