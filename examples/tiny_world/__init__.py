"""A tiny world of templated questions and answers, in which the whole recipe runs on a laptop in minutes."""
