"""The terms of the objective (Appendix C) as pure functions, an example each; `objective` reduces and weighs them."""
