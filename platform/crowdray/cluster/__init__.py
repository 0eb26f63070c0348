"""The only floor that knows Ray: conversion, training and prediction spread over a machine or a cluster."""
