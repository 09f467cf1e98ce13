"""The OpenAPI document, the docs page and the READMEs, as browsers, tools and users read them."""
