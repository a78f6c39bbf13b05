"""What the tests stand on: small models, fakes and references."""
