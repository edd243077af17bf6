"""The contract: `.proto` files and, beside them, the code generated from them (`make protos`)."""
