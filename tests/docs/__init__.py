"""The OpenAPI document, its page and the README, read as others read them."""
