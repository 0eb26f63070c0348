"""Counting on whole images and the errors of counts; torch and numpy only."""
